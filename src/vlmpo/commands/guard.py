"""What surrounds a command that writes into a folder: its inputs kept, the folder its own, its end noted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from vlmpo.commands.folder_lock import locked
from vlmpo.commands.overwrite import find_old_run
from vlmpo.commands.run_folder import MANIFEST, WRITTEN, check_run_folder, read_manifest, read_paths, refuse_inputs
from vlmpo.errors import VlmpoError, first_line, met_by_all
from vlmpo.fileio import replace_json, writing
from vlmpo.interrupt import Interrupted
from vlmpo.recipe import Recipe
from vlmpo.train.config import MPOConfig
from vlmpo.train.launcher import refuse_unseen_ranks
from vlmpo.train.provenance import utc_now

_KEY = "training.output_dir"


@contextmanager
def training_folder(recipe: Recipe, args: MPOConfig, overwrite: bool = False) -> Iterator[dict[str, Any] | None]:
    """Hold the run folder in the body, on the first rank; yield the manifest of the run that is there, on every rank.

    Args:
        recipe: of the run.
        args: its settings.
        overwrite: a run that is there is to be deleted, and none is yielded; the body does so.

    Raises:
        VlmpoError: the folder is an input, holds a run that is not to be resumed or files of others, or another process
            holds it; on every rank. Or the disk is full, read-only or gone.
    """
    folder = Path(args.output_dir)
    refuse_unseen_ranks(os.environ, args.world_size)  # each of them would take itself for the first rank
    with ExitStack() as stack:
        manifest, refusal = None, None
        if args.process_index == 0:
            try:
                manifest = stack.enter_context(_own(recipe, folder, args.resume_from_checkpoint, overwrite))
            except VlmpoError as error:
                refusal = error
        if args.world_size > 1:
            from accelerate.utils import broadcast_object_list

            manifest, refusal = broadcast_object_list([manifest, refusal])
        if refusal is not None:
            raise met_by_all(refusal)
        with writing(folder):
            yield manifest


@contextmanager
def _own(recipe: Recipe, folder: Path, resume: str | bool | None, overwrite: bool) -> Iterator[dict[str, Any] | None]:
    with ExitStack() as stack:
        with writing(folder):
            look_at_folder(recipe, folder, True, overwrite)  # not even a lock is put into a folder of others
            stack.enter_context(locked(folder, "train", _KEY))
            manifest = look_at_folder(recipe, folder, resume, overwrite)  # as the last holder left it
        yield manifest


def look_at_folder(recipe: Recipe, folder: Path, resume: str | bool | None, overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of the run in ``folder`` that goes on; refuse what would destroy files. Changes nothing.

    Raises:
        VlmpoError: as :func:`training_folder`, but for the process that holds the folder.
    """
    inputs = read_paths(recipe, "train")
    refuse_inputs(inputs, folder, _KEY, WRITTEN, whole=True)
    manifest = check_run_folder(folder, resume or overwrite)
    if overwrite:
        find_old_run(folder, inputs)
    return None if overwrite else manifest


@contextmanager
def end_noted(folder: Path) -> Iterator[None]:
    """Note in the manifest that a signal or an error has ended the body, which is a run from its first step on."""
    try:
        yield
    except Interrupted as stop:
        _note(folder, "interrupted", signal=stop.signal_name, step=stop.step)
        raise
    except Exception as error:
        _note(folder, "failed", error=first_line(error))
        raise


def _note(folder: Path, status: str, **details: Any) -> None:
    with suppress(OSError, VlmpoError):  # what ended the run matters more, e.g. that the disk is full
        manifest = read_manifest(folder)
        if manifest is not None and manifest["status"] == "running":  # else its end is written
            history = [*manifest.get("history", []), {status: utc_now(), **details}]
            replace_json(folder / MANIFEST, {**manifest, "status": status, "history": history})


@contextmanager
def output_folder(recipe: Recipe, folder: Path, command: str, key: str, written: tuple[str, ...]) -> Iterator[None]:
    """Hold ``folder``, where ``command`` writes the files ``written``, in the body.

    Raises:
        VlmpoError: one of them is an input, another process holds the folder, or the disk is full, read-only or gone.
    """
    with writing(folder):
        refuse_inputs(read_paths(recipe, command), folder, key, written)
        if os.environ.get("RANK", "0") != "0":
            yield
            return
        with locked(folder, command, key):
            yield
