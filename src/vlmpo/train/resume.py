"""Choose the checkpoint that a run goes on from: the newest that can be believed, or the one that is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from vlmpo.errors import RunError, met_by_all
from vlmpo.log import logger
from vlmpo.train.checkpoint import is_verified

DamageIn = Callable[[Path], Sequence[str]]  # what is wrong with a checkpoint, the same on every rank


def choose_checkpoint(
    resume: str | Literal[True], folder: str, there: Sequence[Path], damage_in: DamageIn
) -> Path | None:
    """Return the checkpoint to go on from; None if there is none yet, so that the run starts.

    Args:
        resume: True for the newest sound one, or the one that the user names.
        folder: the run folder.
        there: its checkpoints, the newest first, the same on every rank.
        damage_in: finds what is wrong with a checkpoint; every rank calls it for the same ones.

    Raises:
        RunError: the one that is named is damaged, or none is sound.
    """
    if resume is True:
        chosen = _newest_sound(folder, there, damage_in)
    else:
        chosen = Path(resume)
        _refuse_damaged(chosen, there, damage_in)
    if chosen is not None and not is_verified(chosen):
        logger.info(
            f"note: {chosen} has no checksums, as vlmpo 0.1 wrote none: that its files are unchanged cannot be verified"
        )
    return chosen


def _newest_sound(folder: str, there: Sequence[Path], damage_in: DamageIn) -> Path | None:
    damaged: list[str] = []
    for checkpoint in there:
        found = damage_in(checkpoint)
        if not found:
            if damaged:
                logger.warning(f"{'; '.join(damaged)}. Going on from {checkpoint}, the newest that is sound")
            return checkpoint
        damaged.append(_describe(checkpoint, found))
    if damaged:
        raise met_by_all(
            RunError(
                f"no checkpoint in {folder} can be gone on from: {'; '.join(damaged)}. To start anew, remove the "
                "folder or name another one in training.output_dir"
            )
        )
    return None


def _refuse_damaged(named: Path, there: Sequence[Path], damage_in: DamageIn) -> None:
    if not named.is_dir():
        raise RunError(f"training.resume_from_checkpoint: there is no folder {named}")
    found = damage_in(named)
    if not found:
        return
    others = (path for path in there if path.absolute() != named.absolute())
    sound = next((path for path in others if not damage_in(path)), None)
    remedy = f"the newest sound one is {sound}: name that" if sound else "no other one in the run folder is sound"
    raise met_by_all(RunError(f"{_describe(named, found)}; {remedy} in training.resume_from_checkpoint"))


def refuse_damaged_best(checkpoint: str, found: Sequence[str]) -> None:
    """Raise RunError if something was found to be wrong with the checkpoint of the best evaluation."""
    if found:
        raise met_by_all(
            RunError(
                f"the best checkpoint cannot be loaded: {_describe(Path(checkpoint), found)}. Training is over; for "
                "the model of the last step set training.load_best_model_at_end: false and resume"
            )
        )


def _describe(checkpoint: Path, found: Sequence[str]) -> str:
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{checkpoint} is damaged: {', '.join(found[:3])}{more}"
