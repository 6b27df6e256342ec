"""Load and save weights and the state of MPO, whole or not at all; find out whether a checkpoint can be believed.

transformers' Trainer loads a checkpoint by ``load_state_dict(strict=False)``, although ``save_pretrained`` writes other
key names for many VLMs: nothing fits, it warns, and training goes on from the initial weights. Here a checkpoint is
loaded as a user would load it, through ``from_pretrained``, and every weight must be in it.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR

from vlmpo import compat
from vlmpo.errors import ModelError, RunError, first_line
from vlmpo.fileio import dump_json, replace_json
from vlmpo.loss import RewardShift
from vlmpo.models.adapters import active_adapter, is_peft, take_over
from vlmpo.train.checkpoint_io import (
    STATE_FILE,
    TRAINER_FILE,
    Checksums,
    checkpoints_in,
    damaged_files,
    missing_files,
    step_of,
    unreadable_files,
)
from vlmpo.train.counts import PairCounts

# ---- weights ----


def load_weights(model: Any, checkpoint: str | os.PathLike[str]) -> None:
    """Load the weights of ``checkpoint`` into ``model`` (a transformers or PEFT model), strictly.

    Memory is taken for a second model of ``model``'s own shapes, whatever the checkpoint's config says.

    Raises:
        ModelError: a weight of the model is missing in the checkpoint, has another shape, or one is left over.
    """
    if is_peft(model):
        name = active_adapter(model)  # PEFT writes an adapter that is not named ``default`` into a folder of its name
        take_over(model, checkpoint if name == "default" else Path(checkpoint) / name)
        return
    try:
        fresh, info = type(model).from_pretrained(
            checkpoint,
            config=copy.deepcopy(model.config),
            dtype=next(model.parameters()).dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"checkpoint {checkpoint} does not fit the model: {first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(str(key) for key in sorted(info[kind], key=str)[:5])
            raise ModelError(f"checkpoint {checkpoint} does not fit the model, {kind.replace('_', ' ')}: {names}")
    model.load_state_dict(fresh.state_dict(), strict=True)


# ---- the optimizer's settings ----


@contextmanager
def settings_as_given(optimizer: Any, scheduler: Any, checkpoint: str | os.PathLike[str]) -> Iterator[None]:
    """Let optimizer and scheduler load a checkpoint in the body; rates, decay and schedule stay as the run gave them.

    A checkpoint's optimizer brings the settings it had, and its scheduler the rates it began with: what the user wrote
    since would have no effect. Only the optimizer's moments and the scheduler's count of steps go on.

    Raises:
        RunError: the checkpoint's optimizer is of other parameters, or of another kind.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    by_formula = isinstance(scheduler, LambdaLR)  # others keep their rates in the optimizer
    given = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    base = list(getattr(scheduler, "base_lrs", ()))
    try:
        yield
    except (ValueError, KeyError, RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise RunError(f"the optimizer in {checkpoint} is not of this run: {first_line(error)}") from error
    if not by_formula:
        return
    scheduler.base_lrs = base
    rates = [rate * scale(scheduler.last_epoch) for rate, scale in zip(base, scheduler.lr_lambdas, strict=True)]
    for group, settings, rate in zip(optimizer.param_groups, given, rates, strict=True):
        group.update(settings, lr=rate)
    compat.set_last_rates(scheduler, rates)


# ---- the state of MPO ----

# What vlmpo 0.1 wrote, without a checksum; nothing else is believed without one.
_OF_0_1 = ("reward_shift", "reference_hash", "accounts", "learning_rates")


def write_state(
    checkpoint: str | os.PathLike[str],
    *,
    reward_shift: RewardShift,
    reference_hash: str | None,
    pair_counts: PairCounts,
    learning_rates: Mapping[str, float] | None,
    files: Checksums | None = None,
    **more: Any,
) -> None:
    """Write the state of MPO into a checkpoint, atomically; it must be the last file written there.

    Args:
        checkpoint: folder of the checkpoint.
        reward_shift: delta.
        reference_hash: hash of the reference's weights; None without a reference.
        pair_counts: what became of the pairs, over all ranks.
        learning_rates: learning rates by part, if any.
        files: size and CRC-32 of every other file of the checkpoint.
        more: further JSON values: what the run was made by, its history, its metrics since the last log.
    """
    state = {
        "reward_shift": reward_shift.state_dict(),
        "reference_hash": reference_hash,
        "accounts": pair_counts.to_json(),
        "learning_rates": learning_rates or None,
        **more,
        "files": files or {},
    }
    state = json.loads(dump_json(state))  # a sum of losses may be infinite, which JSON has no word for
    replace_json(Path(checkpoint) / STATE_FILE, {**state, "checksum": _checksum(state)})


def read_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state of MPO in a checkpoint.

    Raises:
        RunError: it has none, as vlmpo did not write it, or did not finish; or it is damaged.
    """
    file = Path(checkpoint) / STATE_FILE
    if not file.is_file():
        raise RunError(
            f"{checkpoint} is no complete vlmpo checkpoint ({STATE_FILE} is missing); "
            "give another one in training.resume_from_checkpoint"
        )
    try:
        state = json.loads(file.read_bytes())
        wrong = _what_is_wrong(state)
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{checkpoint} is damaged: {STATE_FILE} cannot be read ({first_line(error)})") from error
    if wrong:
        raise RunError(f"{checkpoint} is damaged: {STATE_FILE} {wrong}")
    return state if "checksum" in state else {key: state.get(key) for key in _OF_0_1}


def _checksum(state: Mapping[str, Any]) -> int:
    """Return the CRC-32 of a state, whatever the layout of its JSON."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _what_is_wrong(state: Any) -> str | None:
    """Return why ``state`` is not what :func:`write_state` wrote; None if it is."""
    if not isinstance(state, dict):
        return "holds no JSON object"
    if "checksum" in state or "files" in state:  # vlmpo 0.1 wrote neither
        rest = {name: value for name, value in state.items() if name != "checksum"}
        if state.get("checksum") != _checksum(rest):
            return "has changed"
    shift, rates, files = state.get("reward_shift"), state.get("learning_rates"), state.get("files", {})
    if not isinstance(shift, dict) or not all(_is_number(shift.get(name)) for name in ("sum", "count")):
        return "holds no finite delta (reward_shift)"
    if not isinstance(state.get("reference_hash", 0), str | None):
        return "holds no reference_hash"
    if not _are_counts(state.get("accounts")):
        return "holds no counts of pairs (accounts)"
    if rates is not None and not (isinstance(rates, dict) and all(map(_is_number, rates.values()))):
        return "holds no rates (learning_rates)"
    if not isinstance(files, dict) or not all(map(_is_checksum, files.values())):
        return "holds no checksums (files)"
    return None


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _are_counts(value: Any) -> bool:
    """Return whether ``value`` is what ``PairCounts.to_json`` returns."""
    if not isinstance(value, dict) or not all(isinstance(value.get(k), dict) for k in ("used", "dropped", "examples")):
        return False
    if not _is_number(value.get("empty_steps", 0)) or not isinstance(value.get("dropped_later", {}), dict):
        return False
    by_source = [value["used"], *value["dropped"].values(), *value.get("dropped_later", {}).values()]
    return all(isinstance(part, dict) and all(map(_is_number, part.values())) for part in by_source) and all(
        isinstance(messages, list) for messages in value["examples"].values()
    )


def _is_checksum(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, int) for part in value)


def check_rates(checkpoint: str | os.PathLike[str], learning_rates: Mapping[str, float] | None) -> None:
    """Raise RunError if the checkpoint was trained with other ``learning_rates``."""
    before, now = read_state(checkpoint).get("learning_rates"), learning_rates or None
    if before != now:
        raise RunError(
            f"{checkpoint} was trained with training.learning_rates {before}, this run has {now}; "
            "the optimizer goes on with the rates it had: set the same ones"
        )


def check_reference(checkpoint: str | os.PathLike[str], reference_hash: str | None) -> None:
    """Raise RunError if the checkpoint was trained against another reference."""
    if read_state(checkpoint)["reference_hash"] != reference_hash:
        raise RunError(
            f"{checkpoint} was trained against a different reference model; start from the same initial model "
            "(a resumed policy must not become its own reference)"
        )


def restore_state(
    checkpoint: str | os.PathLike[str], *, reward_shift: RewardShift, reference_hash: str | None
) -> PairCounts:
    """Restore delta from a checkpoint, and return its pair counts.

    Raises:
        RunError: the checkpoint was trained against another reference, or with another mode of delta.
    """
    check_reference(checkpoint, reference_hash)
    state = read_state(checkpoint)
    try:
        reward_shift.load_state_dict(state["reward_shift"])
    except (ValueError, KeyError) as error:
        raise RunError(f"{checkpoint}: {error}") from error
    return PairCounts.from_json(state["accounts"])


# ---- whether a checkpoint can be believed ----


def damage(checkpoint: str | os.PathLike[str], *, to_resume: bool = True, part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint, one message a fault; [] if it can be believed.

    Args:
        checkpoint: its folder.
        to_resume: whether training goes on from it; else its weights and delta are enough.
        part, parts: contents of only this part of its files are read, so that ranks can share the work.
    """
    folder = Path(checkpoint)
    if not (folder / STATE_FILE).is_file():
        return [f"{STATE_FILE} is missing"]
    try:
        recorded = read_state(folder).get("files")
    except RunError as error:
        return [str(error).removeprefix(f"{checkpoint} is damaged: ")]
    found = damaged_files(folder, recorded, part, parts) if recorded else unreadable_files(folder)
    if not found:
        found = missing_files(folder, to_resume=to_resume)
    if not found and to_resume and steps_done(folder) is None:
        found = [f"{TRAINER_FILE} tells no step"]
    return found


def is_verified(checkpoint: str | os.PathLike[str]) -> bool:
    """Return whether a checkpoint has checksums; those of vlmpo 0.1 have none."""
    return bool(read_state(checkpoint).get("files"))


def steps_done(checkpoint: str | os.PathLike[str]) -> int | None:
    """Return the optimizer steps that a checkpoint was written after, None if it does not tell, or tells two."""
    try:
        step = json.loads((Path(checkpoint) / TRAINER_FILE).read_bytes())["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    named = step_of(checkpoint)
    return step if isinstance(step, int) and named in (None, step) else None


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete ``checkpoint-N`` in ``output_dir``, sound or not; None if there is none."""
    return next((folder for folder in checkpoints_in(output_dir) if (folder / STATE_FILE).is_file()), None)


def last_choices(output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the run in ``output_dir`` had chosen by its newest checkpoint; empty if that cannot be read."""
    newest = last_complete_checkpoint(output_dir)
    try:
        state = {} if newest is None else read_state(newest)
    except RunError:
        return {}
    return (state.get("settings") or {}).get("chosen") or {}
