"""What surrounds a command that writes into a folder: its inputs kept, the folder its own, the disk's errors named."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vlmpo.errors import RunError
from vlmpo.fileio import replace_json, writing
from vlmpo.interrupt import Interrupted
from vlmpo.recipe import Recipe
from vlmpo.run_folder import WRITTEN, is_ours, locked, refuse_foreign, refuse_inputs


@contextmanager
def training_folder(recipe: Recipe, args: Any) -> Iterator[None]:
    """Hold the run folder in the body, on the first rank; if a signal ends the body, note that in the manifest.

    Args:
        recipe: of the run.
        args: its MPOConfig.

    Raises:
        RunError: the folder is an input, holds files of others, or another process holds it; on every rank. Or the disk
            is full, read-only or gone.
    """
    folder = Path(args.output_dir)
    with ExitStack() as stack:
        refusal = None
        if args.process_index == 0:
            try:
                stack.enter_context(_own(recipe, folder))
            except RunError as error:
                refusal = error
        if args.world_size > 1:
            from accelerate.utils import broadcast_object_list

            (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            refusal.met_by = "all"
            raise refusal
        try:
            with writing(folder):
                yield
        except Interrupted as stop:
            if args.process_index == 0:
                _note(folder / "manifest.json", stop)
            raise


@contextmanager
def _own(recipe: Recipe, folder: Path) -> Iterator[None]:
    with writing(folder):
        refuse_inputs(read_paths(recipe), folder, "training.output_dir", WRITTEN, whole=True)
        refuse_foreign(folder, "training.output_dir")
        stack = ExitStack()
        stack.enter_context(locked(folder, "train", "training.output_dir"))
    with stack:
        yield


@contextmanager
def output_folder(recipe: Recipe, folder: Path, command: str, key: str, written: tuple[str, ...]) -> Iterator[None]:
    """Hold ``folder``, where ``command`` writes the files ``written``, in the body.

    Raises:
        RunError: one of them is an input, another process holds the folder, or the disk is full, read-only or gone.
    """
    with writing(folder):
        refuse_inputs(read_paths(recipe), folder, key, written)
        if os.environ.get("RANK", "0") != "0":
            yield
            return
        with locked(folder, command, key):
            yield


def read_paths(recipe: Recipe) -> dict[str, str | None]:
    """Return whatever the recipe reads from, by key: models, adapters' bases, data, questions, image roots."""
    paths: dict[str, str | None] = {"model.path": recipe.model.path}
    for part in ("train", "eval"):
        for number, source in enumerate(getattr(recipe.data, part)):
            paths[f"data.{part}.{number}.path"] = source.path
            paths[f"data.{part}.{number}.image_root"] = source.image_root
    for name, section in (("build", recipe.build), ("evaluate", recipe.evaluate)):
        for key in ("questions", "image_root", "model", "reference", "against"):
            if section is not None and not (name == "build" and key == "model"):  # which a server knows it by
                paths[f"{name}.{key}"] = getattr(section, key, None)
    bases = {f"the base of the adapter {key}": _base(path) for key, path in paths.items() if path is not None}
    return {**paths, **bases}


def _base(path: str) -> str | None:
    try:
        named = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
        return str(named["base_model_name_or_path"] or "") or None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no adapter


def _note(manifest: Path, stop: Interrupted) -> None:
    if is_ours(manifest):
        content = json.loads(manifest.read_text(encoding="utf-8"))
        end = {
            "signal": stop.signal_name,
            "step": stop.step,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        replace_json(manifest, {**content, "status": "interrupted", "interrupted": end})
