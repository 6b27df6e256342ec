"""What a command may write over: its own folder, never what it reads, nor files of another run."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vlmpo.errors import RecipeError, RunError, first_line
from vlmpo.models.adapters import named_base
from vlmpo.recipe import Recipe
from vlmpo.train.checkpoint import last_complete_checkpoint
from vlmpo.train.checkpoint_io import checkpoints_in

MANIFEST = "manifest.json"
STATUSES = ("running", "finished", "interrupted", "failed")  # of a manifest
# What a training run writes into its folder, or lets transformers write. Anything else there is no hindrance: logs of
# Slurm (slurm-1.out), TensorBoard's and W&B's folders, notes.
WRITTEN = (
    *(MANIFEST, "recipe.yaml", "metrics.jsonl", "README.md", "checkpoint-*", "ema", "config.json", "*_config.json"),
    *("*.safetensors", "*.index.json", "pytorch_model*", "adapter_model*", "training_args.bin"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"),
    *("report.html", "report.png", "report_data.json", "answers.jsonl", "answers_before.jsonl"),
)
# What each command reads from, beside the model of model.path.
_READ = {
    "train": ("data", "evaluate.questions", "evaluate.image_root"),
    "evaluate": ("data", *(f"evaluate.{key}" for key in ("model", "reference", "against", "questions", "image_root"))),
    "sample": ("build.questions", "build.image_root"),
    "pair": ("build.questions", "build.image_root"),
}


# ---- a run that is there ----


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
    if not isinstance(manifest, dict) or manifest.get("status") not in STATUSES:
        raise RunError(f"{file} is not of a run of vlmpo; name another folder in training.output_dir")
    return manifest


def check_run_folder(folder: Path, resume: str | bool | None) -> dict[str, Any] | None:
    """Return the manifest of the run that is in ``folder``, None if there is none; refuse what would destroy files.

    Args:
        folder: the run folder, ``training.output_dir``; it may be absent.
        resume: ``training.resume_from_checkpoint``.

    Raises:
        RunError: the folder holds a run, which is not to be resumed, or files that are no run's; or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"training.output_dir: {folder} is a file; name a folder")
    manifest = read_manifest(folder)
    if manifest is None and last_complete_checkpoint(folder) is None:
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


def _refuse_a_run(folder: Path, manifest: dict[str, Any] | None) -> None:
    if manifest is not None and manifest["status"] != "finished" and not checkpoints_in(folder):
        raise RunError(
            f"{folder} already holds a run, which has not reached its first checkpoint. "
            "Set training.resume_from_checkpoint=true, which starts it anew, delete it by --overwrite, or name another "
            "folder in training.output_dir"
        )
    raise RunError(
        f"{folder} already holds a run; set training.resume_from_checkpoint=true to resume it, --overwrite to "
        "delete it and start anew, or name another folder in training.output_dir"
    )


def _refuse_files_of_others(folder: Path) -> None:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    taken = [name for name in names if any(fnmatchcase(name, pattern) for pattern in WRITTEN)]
    if taken:
        more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
        raise RunError(
            f"training.output_dir: {folder} holds {', '.join(taken[:3])}{more}, which no run of vlmpo wrote and this "
            "one would write over; name another folder"
        )


# ---- what is read ----


def read_paths(recipe: Recipe, command: str) -> dict[str, str]:
    """Return what ``command`` reads from, by recipe key: local paths, globs or Hub names; bases of adapters too."""
    known: dict[str, str | None] = {"model.path": recipe.model.path}
    for part in ("train", "eval"):
        for number, source in enumerate(getattr(recipe.data, part)):
            known |= {f"data.{part}.{number}.{key}": getattr(source, key) for key in ("path", "image_root")}
    for name, section in (("build", recipe.build), ("evaluate", recipe.evaluate)):
        known |= {f"{name}.{key}": value for key, value in (section or ()) if isinstance(value, str)}
    read = ("model.path", *_READ[command])
    paths = {key: path for key, path in known.items() if path and (key in read or key.split(".")[0] in read)}
    bases = {f"the base model of {key}": named_base(path) for key, path in paths.items() if os.path.isdir(path)}
    return {**paths, **{key: base for key, base in bases.items() if base}}


def refuse_inputs(
    inputs: Mapping[str, str], folder: Path, key: str, written: Sequence[str], *, whole: bool = False
) -> None:
    """Raise RecipeError if something that is read lies where ``folder`` is written to, whatever links lead there.

    Args:
        inputs: local paths, globs or Hub names, by recipe key.
        folder: where the command writes.
        key: the recipe key that names it.
        written: names of what it writes there, as patterns.
        whole: an input must not be ``folder`` itself either.
    """
    target = Path(os.path.realpath(folder))
    for name, given in inputs.items():
        for path in _existing(given):
            real = Path(os.path.realpath(path))
            same = real == target or _same_file(real, target)
            first = real.relative_to(target).parts[:1] if real.is_relative_to(target) else ()
            if (whole and same) or (first and any(fnmatchcase(first[0], pattern) for pattern in written)):
                raise RecipeError(
                    f"{key}: {folder} is where {name} lies ({path}), which would be written over; name another folder"
                )


def _existing(given: str) -> Iterable[str]:
    if os.path.exists(given):
        return (given,)
    return glob.iglob(given, recursive=True) if glob.has_magic(given) else ()


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
