"""``vlmpo train --dry-run``: all that comes before the first step, and nothing of it is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from vlmpo.commands.folder_lock import refuse_if_held
from vlmpo.commands.guard import look_at_folder
from vlmpo.commands.inspect import describe_steps, encode_pairs, show_sizes
from vlmpo.commands.overwrite import find_old_run
from vlmpo.commands.run_data import none_left, show_pair_counts
from vlmpo.commands.run_folder import read_paths
from vlmpo.commands.train import checked_config, prepare
from vlmpo.fileio import writing
from vlmpo.log import print_line
from vlmpo.recipe import Recipe
from vlmpo.train.checkpoint import damage
from vlmpo.train.checkpoint_io import checkpoints_in
from vlmpo.train.device_memory import free_bytes, in_units, pending_bytes
from vlmpo.train.memory_choice import LOOKED_AT, ranks_of_machine
from vlmpo.train.resume import choose_checkpoint
from vlmpo.train.trainer import MPOTrainer

_KEY = "training.output_dir"


class _Ready(Exception):  # noqa: N818 - no error: it ends a run before its first step
    """All is done that comes before the first step."""


class _BeforeFirstBatch(TrainerCallback):
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise _Ready


def dry_run(recipe: Recipe, allow_changes: Sequence[str] = (), overwrite: bool = False) -> None:
    """Read, encode and measure as ``vlmpo train`` would before its first step; print what it would do.

    Nothing is trained, and nothing is written into the run folder, which is not even made. Reports to no tracker.

    Args:
        recipe: of the run.
        allow_changes, overwrite: as of ``vlmpo train``.

    Raises:
        VlmpoError: what would end the run before its first step.
    """
    args = checked_config(recipe, allow_changes, overwrite)
    folder, newest = Path(args.output_dir), args.resume_from_checkpoint is True
    before = _look_at_folder(recipe, folder, args.resume_from_checkpoint, overwrite)
    resume = _checkpoint_to_resume(args.resume_from_checkpoint, folder)
    with tempfile.TemporaryDirectory(prefix="vlmpo-dry-run-") as elsewhere:
        args.output_dir, args.resume_from_checkpoint = elsewhere, resume
        args.report_to, args.push_to_hub, args.eval_on_start, args.disable_tqdm = [], False, False, True
        trainer, data, _, is_finished = prepare(recipe, args, folder, before, newest)
        encoded = encode_pairs(recipe, data, trainer.processing_class, num_samples=0)
        num_encoded = len(encoded.sizes) + encoded.dropped.num_dropped
        if not encoded.sizes:
            raise none_left("data.train", num_encoded, "train", encoded.dropped)
        if not is_finished:
            _start(trainer, resume)
        memory = [] if is_finished else _memory(trainer)
        if not trainer.accelerator.is_main_process:
            return
        show_pair_counts(data, encoded.dropped, trained=False)
        if num_encoded < len(data.train):
            print_line(f"encoded: a seeded sample, {num_encoded} of {len(data.train)} pairs")
        show_sizes(encoded.sizes)
        bound = trainer.data_collator.bound
        tokens = None if bound.limits else bound.most
        steps = describe_steps(recipe, len(data.train), encoded.sizes, trainer.shared, tokens)
        for line in [*steps, *memory, *_what_would_happen(recipe, trainer, folder, resume, overwrite, is_finished)]:
            print_line(line)


# ---- the run folder ----


def _look_at_folder(recipe: Recipe, folder: Path, resume: str | bool | None, overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of the run that would go on; refuse what the run would refuse. Changes nothing."""
    refuse_if_held(folder, "train", _KEY)
    with writing(folder):
        before = look_at_folder(recipe, folder, resume, overwrite)
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()  # without a name, on most file systems
        except OSError as error:
            error.filename = str(folder)
            raise
    return before


def _checkpoint_to_resume(resume: str | bool | None, folder: Path) -> str | None:
    if not resume:
        return None
    chosen = choose_checkpoint(
        resume if isinstance(resume, str) else True,
        str(folder),
        checkpoints_in(folder),
        lambda checkpoint: damage(checkpoint, to_resume=True, part=0, parts=1),
    )
    return None if chosen is None else str(chosen)


# ---- the start of the run ----


def _start(trainer: MPOTrainer, resume: str | None) -> None:
    """Begin to train, and leave off before the first batch."""
    trainer.remove_callback(trainer.metrics_file)
    trainer.add_callback(_BeforeFirstBatch)
    with suppress(_Ready):
        trainer.train(resume_from_checkpoint=resume)


def _memory(trainer: MPOTrainer) -> list[str]:
    """Measure what a run takes; return lines on it."""
    device, choice = trainer.args.device, trainer.row_memory.choice
    held = [("weights", trainer.model), ("the reference", getattr(trainer.reference, "model", None))]
    sizes = [(name, sum(p.nbytes for p in model.parameters())) for name, model in held if isinstance(model, nn.Module)]
    sizes.append(("gradients and optimizer states, not allocated yet", pending_bytes(trainer.model, trainer.optimizer)))
    if not trainer.ranks.share_passes:  # ranks would have to read in step
        probe = trainer.row_probe()
        row = probe.measure(choice is not None and choice.vision == "recompute")
        tokens, patches = probe.largest()
        name = f"a row of the largest of {LOOKED_AT} pairs ({tokens} tokens, {patches} patches), measured"
        sizes.append((name, row.peak(tokens, patches)))
    free = in_units(free_bytes(device, ranks_of_machine()))
    lines = [f"memory: {', '.join(f'{in_units(size)} {name}' for name, size in sizes)}; {free} are free on {device}"]
    return [*lines, choice.line] if choice is not None and choice.line else lines


def _what_would_happen(
    recipe: Recipe, trainer: MPOTrainer, folder: Path, resume: str | None, overwrite: bool, is_finished: bool
) -> Iterator[str]:
    """Yield lines on what ``vlmpo train`` would do."""
    every, trained = (sum(counts) for counts in zip(*trainer.parameter_counts.values(), strict=True))
    reference = (
        "none" if trainer.reference is None else type(trainer.reference).__name__.removesuffix("Reference").lower()
    )
    yield f"model: {every:,} parameters, {trained:,} trained; precision {trainer.precision}; reference: {reference}"
    yield f"optimizer steps: {trainer.planned_steps()} in all; nothing is known of their time before one is made"
    old = find_old_run(folder, read_paths(recipe, "train")) if overwrite else None
    if is_finished:
        yield f"run folder: {folder}, whose run is finished: nothing would be trained"
    elif resume is not None:
        yield f"run folder: {folder}; the run would go on from {resume}"
    elif old is not None:
        yield f"run folder: {folder}; --overwrite would delete {old.describe()}"
    else:
        yield f"run folder: {folder}{'' if folder.exists() else ', which would be made'}"
    yield "dry run: nothing was trained, and nothing was written into the run folder"
