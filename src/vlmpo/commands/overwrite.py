"""``vlmpo train --overwrite``: what of a run folder is the run's own, and may be deleted."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from vlmpo.commands.folder_lock import refuse_if_held
from vlmpo.commands.run_folder import MANIFEST, WRITTEN, read_manifest, refuse_inputs
from vlmpo.errors import RecipeError, RunError, shorten
from vlmpo.report.files import AGAINST, ANSWERS, ANSWERS_BEFORE
from vlmpo.report.kept import KEPT_FILE
from vlmpo.report.write import PICTURE_FILE, REPORT_FILE
from vlmpo.train.checkpoint import read_state
from vlmpo.train.checkpoint_io import PARTIAL_FOLDER, PARTIAL_MODEL, STATE_FILE, checkpoints_in, files_in
from vlmpo.train.ema import AVERAGE_FOLDER

_KEY = "training.output_dir"
_EVALUATION = "evaluation"  # where `vlmpo evaluate` writes by default
# Exact names, where vlmpo.commands.run_folder.WRITTEN has patterns: what is deleted must be known to be a run's.
_MODEL = (
    *("config.json", "generation_config.json", "adapter_config.json", "processor_config.json", "README.md"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "training_args.bin"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
_WEIGHTS = re.compile(
    r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?"
)
_REPORT = (REPORT_FILE, PICTURE_FILE, KEPT_FILE, ANSWERS, ANSWERS_BEFORE)
_RUN = (MANIFEST, "recipe.yaml", "metrics.jsonl", "trainer_state.json", *_REPORT)
_RESULTS = ("all_results.json", "train_results.json", "eval_results.json")
_OF_EVALUATION = ("evaluation.json", AGAINST, *_REPORT)
_LEFT_BY_A_KILL = re.compile(r".+\.[0-9a-f]{32}\.partial")  # of vlmpo.fileio


@dataclass(frozen=True)
class OldRun:
    """Holds what deleting a run takes away.

    Attributes:
        folder: the run folder.
        own: its files and checkpoints, the manifest last: with it an interrupted deletion can be done again.
        kept: names of what else is in the folder.
        started: when the run began, as its manifest says.
    """

    folder: Path
    own: list[Path]
    kept: list[str]
    started: str

    def describe(self) -> str:
        """Return in a few words which run it is, and what stays."""
        checkpoints = sum(path.name.startswith("checkpoint-") for path in self.own)
        kept = f"; kept, as no run wrote it: {shorten(', '.join(self.kept), 200)}" if self.kept else ""
        return f"the run of {self.started} in {self.folder}, {checkpoints} checkpoints{kept}"


def find_old_run(folder: Path, inputs: Mapping[str, str]) -> OldRun | None:
    """Return what ``--overwrite`` deletes in ``folder``, None if there is no run; deletes nothing.

    Args:
        folder: the run folder; it may be absent.
        inputs: what the new run reads, by recipe key.

    Raises:
        VlmpoError: there are checkpoints without the manifest of a run, files that are not the run's and would be lost,
            or something the new run reads; the folder is a link; or it is being evaluated.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        if checkpoints_in(folder):
            raise RunError(f"--overwrite: {folder} holds checkpoints, but no {MANIFEST} says of which run; {_MOVE}")
        return None
    if not (isinstance(manifest.get("versions"), dict) and "vlmpo" in manifest["versions"]):
        raise RunError(f"--overwrite: {folder / MANIFEST} does not say that vlmpo made this run; {_MOVE}")
    if folder.is_symlink():
        raise RunError(
            f"--overwrite: {folder} is a link to {os.path.realpath(folder)}, and what is behind a link is not deleted; "
            f"name the folder itself in {_KEY}"
        )
    own = list(_own(folder))
    names = {path.relative_to(folder).parts[0] for path in own}
    kept = [entry.name for entry in folder.iterdir() if entry.name not in names and not _is_lock(entry.name)]
    if lost := sorted(name for name in kept if any(fnmatchcase(name, pattern) for pattern in WRITTEN)):
        raise RunError(
            f"--overwrite: {folder} holds {shorten(', '.join(lost), 200)}, which the run there did not write and the "
            f"new one might write over; {_MOVE}"
        )
    kept += [str(path.relative_to(folder)) for path in _others_below(folder, own)]
    _refuse_inputs_in(folder, inputs, names)
    if (folder / _EVALUATION).is_dir():
        refuse_if_held(folder / _EVALUATION, "evaluate", "evaluate.output_dir")
    own.sort(key=lambda path: path.name == MANIFEST)
    return OldRun(folder, own, sorted(kept), str(manifest.get("started", "unknown")))


def delete(run: OldRun) -> None:
    """Delete a run; follows no link, and leaves the folder and what is not the run's."""
    for path in run.own:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in (AVERAGE_FOLDER, _EVALUATION):
        below = run.folder / name
        if below.is_dir() and not below.is_symlink() and not any(below.iterdir()):
            below.rmdir()


_MOVE = f"move it away, or name another folder in {_KEY}"


def _own(folder: Path) -> Iterator[Path]:
    """Yield what the run in ``folder`` has written. Raises RunError for files of others in a checkpoint."""
    for entry in sorted(folder.iterdir()):
        if entry.name in (*_RUN, *_RESULTS) or _is_of_model(entry.name) or _LEFT_BY_A_KILL.fullmatch(entry.name):
            if (not entry.is_dir() or entry.is_symlink()) and not _is_card_of_others(entry):
                yield entry
        elif entry.name in (PARTIAL_FOLDER, PARTIAL_MODEL):
            yield entry
    for checkpoint in checkpoints_in(folder):
        _refuse_others_in(checkpoint)
        yield checkpoint
    for name, known in ((AVERAGE_FOLDER, ()), (_EVALUATION, _OF_EVALUATION)):
        below = folder / name
        if below.is_dir() and not below.is_symlink():
            files = (path for path in below.iterdir() if not path.is_dir() or path.is_symlink())
            yield from (path for path in files if path.name in known or (not known and _is_of_model(path.name)))


def _is_of_model(name: str) -> bool:
    return name in _MODEL or _WEIGHTS.fullmatch(name) is not None


def _is_card_of_others(path: Path) -> bool:
    return path.name == "README.md" and b"vlmpo" not in path.read_bytes()


def _is_lock(name: str) -> bool:
    return name.startswith("_") and ".lock" in name


def _refuse_others_in(checkpoint: Path) -> None:
    """Raise RunError if a checkpoint holds files that it was not written with: they would be lost with it."""
    if checkpoint.is_symlink():
        return  # the link alone is deleted
    if not (checkpoint / STATE_FILE).is_file():
        raise RunError(f"--overwrite: {checkpoint} is no complete checkpoint of vlmpo; {_MOVE}")
    known = read_state(checkpoint).get("files")
    if known and (others := sorted(set(files_in(checkpoint)) - set(known))):  # vlmpo 0.1 listed none
        raise RunError(
            f"--overwrite: {checkpoint} holds {shorten(', '.join(others), 200)}, which it was not written with; {_MOVE}"
        )


def _others_below(folder: Path, own: list[Path]) -> Iterator[Path]:
    """Yield what is kept in the folders of averaged weights and of the evaluation."""
    for name in (AVERAGE_FOLDER, _EVALUATION):
        below = folder / name
        if below.is_dir() and any(path.parent == below for path in own):
            yield from (path for path in sorted(below.iterdir()) if path not in own and not _is_lock(path.name))


def _refuse_inputs_in(folder: Path, inputs: Mapping[str, str], names: set[str]) -> None:
    """Raise RecipeError if the new run reads what would be deleted, or a model anywhere in the folder."""
    refuse_inputs(inputs, folder, _KEY, [*names], whole=True)
    target = os.path.realpath(folder)
    for key, path in inputs.items():
        if "model" in key and os.path.realpath(path).startswith(os.path.join(target, "")):
            raise RecipeError(f"--overwrite: {folder} holds {key} ({path}), which must stay; {_MOVE}")
