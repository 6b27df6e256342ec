"""Weights and MPO's own state, out of a checkpoint and into it, whole or not at all.

transformers' Trainer loads a checkpoint by ``load_state_dict(strict=False)``, although ``save_pretrained`` writes other
key names for many VLMs: nothing fits, it warns, and goes on from the initial weights. Here a checkpoint is read back
the way a user would read it, through ``from_pretrained``, and every weight must have been in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmpo.errors import ModelError, RunError
from vlmpo.fileio import replace_json
from vlmpo.loss import RewardShift
from vlmpo.models.adapters import active_adapter, is_peft, take_over
from vlmpo.train.counts import PairCounts

STATE_FILE = "vlmpo_state.json"  # written last: a checkpoint that has it is complete


def load_weights(model: Any, checkpoint: str | os.PathLike[str]) -> None:
    """Load the weights of ``checkpoint`` into ``model`` (a transformers or PEFT model), strictly.

    Raises:
        ModelError: a weight of the model is missing in the checkpoint, has another shape, or one is left over.
    """
    if is_peft(model):
        take_over(model, adapter_folder(model, checkpoint))
        return
    fresh, info = type(model).from_pretrained(
        checkpoint, dtype=next(model.parameters()).dtype, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(str(key) for key in sorted(info[kind], key=str)[:5])
            raise ModelError(f"checkpoint {checkpoint} does not fit the model, {kind.replace('_', ' ')}: {names}")
    model.load_state_dict(fresh.state_dict(), strict=True)


def adapter_folder(model: Any, checkpoint: str | os.PathLike[str]) -> Path:
    """Where PEFT writes the policy's adapter in a checkpoint: one not named ``default`` gets a folder of its own."""
    name = active_adapter(model)
    return Path(checkpoint) if name == "default" else Path(checkpoint) / name


def write_state(
    checkpoint: str | os.PathLike[str],
    *,
    reward_shift: RewardShift,
    reference_hash: str | None,
    pair_counts: PairCounts,
    learning_rates: Mapping[str, float] | None,
) -> None:
    """Write MPO's own state into a checkpoint: the last file of it, put there in one move.

    Args:
        checkpoint: its folder.
        reward_shift: delta.
        reference_hash: of the reference's weights; None without a reference.
        pair_counts: of all ranks.
        learning_rates: by part, if any.
    """
    state = {
        "reward_shift": reward_shift.state_dict(),
        "reference_hash": reference_hash,
        "accounts": pair_counts.to_json(),
        "learning_rates": learning_rates or None,
    }
    replace_json(Path(checkpoint) / STATE_FILE, state)


def read_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return MPO's own state. Raises RunError if the checkpoint has none: it is not ours, or was cut short."""
    file = Path(checkpoint) / STATE_FILE
    if not file.is_file():
        raise RunError(
            f"{checkpoint} is no complete vlmpo checkpoint ({STATE_FILE} is missing); "
            "name another one in training.resume_from_checkpoint"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def check_rates(checkpoint: str | os.PathLike[str], learning_rates: Mapping[str, float] | None) -> None:
    """Raise RunError if the checkpoint was trained with other rates by part."""
    before, now = read_state(checkpoint).get("learning_rates"), learning_rates or None
    if before != now:
        raise RunError(
            f"{checkpoint} was trained with training.learning_rates {before}, this run has {now}; "
            "the optimizer goes on with the rates it had, so give the same"
        )


def restore_state(
    checkpoint: str | os.PathLike[str], *, reward_shift: RewardShift, reference_hash: str | None
) -> PairCounts:
    """Restore delta from a checkpoint, and return its pair counts.

    Raises:
        RunError: the checkpoint was trained against another reference, or with another mode of delta.
    """
    state = read_state(checkpoint)
    if state["reference_hash"] != reference_hash:
        raise RunError(
            f"{checkpoint} was trained against a different reference model; start from the same initial model "
            "(a resumed policy must not become its own reference)"
        )
    try:
        reward_shift.load_state_dict(state["reward_shift"])
    except ValueError as error:
        raise RunError(f"{checkpoint}: {error}") from error
    return PairCounts.from_json(state["accounts"])


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest ``checkpoint-N`` that was written to its end; one cut short by a kill is passed over."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    complete = [folder for folder in folders if (folder / STATE_FILE).is_file()]
    return max(complete, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)
