"""Load and save weights and the state of MPO, whole or not at all.

transformers' Trainer loads a checkpoint by ``load_state_dict(strict=False)``, although ``save_pretrained`` writes other
key names for many VLMs: nothing fits, it warns, and training goes on from the initial weights. Here a checkpoint is
loaded as a user would load it, through ``from_pretrained``, and every weight must be in it.
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
        name = active_adapter(model)  # PEFT writes an adapter that is not named ``default`` into a folder of its name
        take_over(model, checkpoint if name == "default" else Path(checkpoint) / name)
        return
    fresh, info = type(model).from_pretrained(
        checkpoint, dtype=next(model.parameters()).dtype, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(str(key) for key in sorted(info[kind], key=str)[:5])
            raise ModelError(f"checkpoint {checkpoint} does not fit the model, {kind.replace('_', ' ')}: {names}")
    model.load_state_dict(fresh.state_dict(), strict=True)


def write_state(
    checkpoint: str | os.PathLike[str],
    *,
    reward_shift: RewardShift,
    reference_hash: str | None,
    pair_counts: PairCounts,
    learning_rates: Mapping[str, float] | None,
) -> None:
    """Write the state of MPO into a checkpoint, atomically; it must be the last file written there.

    Args:
        checkpoint: folder of the checkpoint.
        reward_shift: delta.
        reference_hash: hash of the reference's weights; None without a reference.
        pair_counts: what became of the pairs, over all ranks.
        learning_rates: learning rates by part, if any.
    """
    state = {
        "reward_shift": reward_shift.state_dict(),
        "reference_hash": reference_hash,
        "accounts": pair_counts.to_json(),
        "learning_rates": learning_rates or None,
    }
    replace_json(Path(checkpoint) / STATE_FILE, state)


def read_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state of MPO in a checkpoint.

    Raises:
        RunError: it has none: vlmpo did not write it, or did not finish.
    """
    file = Path(checkpoint) / STATE_FILE
    if not file.is_file():
        raise RunError(
            f"{checkpoint} is no complete vlmpo checkpoint ({STATE_FILE} is missing); "
            "give another one in training.resume_from_checkpoint"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def check_rates(checkpoint: str | os.PathLike[str], learning_rates: Mapping[str, float] | None) -> None:
    """Raise RunError if the checkpoint was trained with other ``learning_rates``."""
    before, now = read_state(checkpoint).get("learning_rates"), learning_rates or None
    if before != now:
        raise RunError(
            f"{checkpoint} was trained with training.learning_rates {before}, this run has {now}; "
            "the optimizer goes on with the rates it had: set the same ones"
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
    """Return the newest complete ``checkpoint-N`` in ``output_dir``, None if there is none."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    complete = [folder for folder in folders if (folder / STATE_FILE).is_file()]
    return max(complete, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)
