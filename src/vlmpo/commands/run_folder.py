"""What a run may write over: its own folder, never the model it starts from, nor files of another run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vlmpo.errors import RecipeError, RunError, first_line
from vlmpo.models.adapters import named_base
from vlmpo.train.checkpoint import last_complete_checkpoint
from vlmpo.train.checkpoint_files import checkpoints_in

MANIFEST = "manifest.json"
# What a run writes, beside its manifest: found without one, it is not a run's.
_WRITTEN = (
    *("recipe.yaml", "metrics.jsonl", "README.md", "config.json", "adapter_config.json", "generation_config.json"),
    *("model*.safetensors", "adapter_model.*", "pytorch_model*.bin", "tokenizer*", "processor_config.json", "ema/*"),
)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a run folder, None if there is none.

    Raises:
        RunError: it is not of a run of vlmpo, or damaged.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    try:
        manifest = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} cannot be read ({first_line(error)}); move it away") from error
    if not isinstance(manifest, dict) or "status" not in manifest:
        raise RunError(f"{file} is not of a run of vlmpo; name another folder in training.output_dir")
    return manifest


def check_run_folder(folder: Path, model_path: str, resume: str | bool | None) -> dict[str, Any] | None:
    """Return the manifest of the run that is in ``folder``, None if there is none; refuse what would destroy files.

    Args:
        folder: the run folder, ``training.output_dir``; it may be absent.
        model_path: ``model.path``.
        resume: ``training.resume_from_checkpoint``.

    Raises:
        RecipeError: the folder is that of the model that the run starts from.
        RunError: the folder holds a run, which is not to be resumed, or files that are no run's.
    """
    _refuse_the_model(folder, model_path)
    manifest = read_manifest(folder)
    if manifest is None:
        if not (resume and last_complete_checkpoint(folder)):
            _refuse_files_of_others(folder)
    elif not resume:
        _refuse_a_run(folder, manifest)
    return manifest


def same_run(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether two manifests are of the same model and data, as far as the former tells."""

    def named(manifest: dict[str, Any]) -> list[Any]:
        data, model = manifest.get("data") or {}, manifest.get("model") or {}
        return [os.path.realpath(model.get("path") or ""), list((data.get("hashes") or {}).values())]

    return "model" not in before or named(before) == named(now)


def _refuse_the_model(folder: Path, model_path: str) -> None:
    if not os.path.isdir(model_path):
        return
    used = {"model.path": model_path, "the base model of model.path": named_base(model_path)}
    for what, path in used.items():
        if path is None or not os.path.isdir(path):
            continue
        inside = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
        if inside == "." or inside == "ema" or inside.startswith("checkpoint-"):
            raise RecipeError(
                f"training.output_dir: {folder} is where {what} lies ({path}), and the run would write over it; "
                "name another folder"
            )


def _refuse_a_run(folder: Path, manifest: dict[str, Any]) -> None:
    if manifest["status"] != "finished" and not checkpoints_in(folder):
        raise RunError(
            f"{folder} already holds a run, which has not reached its first checkpoint. If it is no longer running, "
            "set training.resume_from_checkpoint=true, which starts it anew; or name another folder in "
            "training.output_dir"
        )
    raise RunError(
        f"{folder} already holds a run; set training.resume_from_checkpoint=true to resume it, "
        "or name another folder in training.output_dir"
    )


def _refuse_files_of_others(folder: Path) -> None:
    found = [path.relative_to(folder) for pattern in _WRITTEN for path in sorted(folder.glob(pattern))]
    found += [path.relative_to(folder) for path in checkpoints_in(folder)]
    if found:
        raise RunError(
            f"training.output_dir: {folder} holds {found[0]}, which is of no run that vlmpo could resume (there is no "
            f"{MANIFEST}) and would be written over; name another folder"
        )
