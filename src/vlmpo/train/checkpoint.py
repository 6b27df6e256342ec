"""Weights and MPO's own state, out of a checkpoint and into it, whole or not at all.

transformers' Trainer loads a checkpoint by ``load_state_dict(strict=False)``, although ``save_pretrained`` writes other
key names for many VLMs: nothing fits, it warns, and goes on from the initial weights. Here a checkpoint is read back
the way a user would read it, through ``from_pretrained``, and every weight must have been in it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vlmpo.errors import ModelError, RunError
from vlmpo.fileio import replace_json
from vlmpo.models.adapters import active_adapter, is_peft, take_over

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


def write_state(checkpoint: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write MPO's own state into a checkpoint: the last file of it, put there in one move."""
    replace_json(Path(checkpoint) / STATE_FILE, state)


def read_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """MPO's own state. Raises RunError where the checkpoint has none: it is not ours, or was cut short."""
    file = Path(checkpoint) / STATE_FILE
    if not file.is_file():
        raise RunError(
            f"{checkpoint} is no complete vlmpo checkpoint ({STATE_FILE} is missing); "
            "name another one in training.resume_from_checkpoint"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest ``checkpoint-N`` that was written to its end; one cut short by a kill is passed over."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    complete = [folder for folder in folders if (folder / STATE_FILE).is_file()]
    return max(complete, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)
