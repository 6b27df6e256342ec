"""Which model families can share a trunk, and what each needs.

A family is on the list only when shared rows were tested against separate forwards. Every other one is read by
separate rows, one response a row: exact for any causal model, only slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmpo.tree.layout import Row

# Text towers with plain causal attention in every layer and one position a token.
PLAIN_CAUSAL_TEXT = frozenset({"qwen2", "qwen3", "llama"})
# Families whose vision inputs are stacked along dimension 0 and whose positions are those of the text tower.
SHARED_FAMILIES = frozenset({"internvl"})


@dataclass(frozen=True)
class Support:
    """Whether a model's rows may share trunks, and why not where they may not."""

    shared: bool
    reason: str


def support_for(config: Any) -> Support:
    """Judge a model by its config: ``shared`` rows, or separate ones with the reason."""
    family = config.model_type
    text = config.get_text_config()
    if family not in SHARED_FAMILIES and family not in PLAIN_CAUSAL_TEXT:
        return Support(False, f"family {family!r} is not on the list of those tested with shared rows")
    if text.model_type not in PLAIN_CAUSAL_TEXT:
        return Support(False, f"text tower {text.model_type!r} is not on the list of those tested with shared rows")
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return Support(False, f"its text tower has layers of kind {', '.join(sorted(kinds - {'full_attention'}))}")
    return Support(True, f"{family} with a {text.model_type} text tower")


# Mean difference a token that rounding explains. A branch that is read wrongly is off by tenths of a nat.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def shared_row_error(
    model: Any, shared: Sequence[Row], separate: Sequence[Row], half: bool, wrapped: Any | None = None
) -> float | None:
    """The start-up check: the same responses read on a shared trunk and each on its own.

    Args:
        model: set up to share trunks.
        shared, separate: the same pair laid out both ways.
        half: whether the run computes in a half-precision type by autocast.
        wrapped: what to call in the model's place: the wrapper that holds its weights.

    Returns:
        None where they agree to rounding, else the mean absolute difference in nats a token.
    """
    kind = shared[0].input_ids.device.type
    dtype = model.get_output_embeddings().weight.dtype
    was_training = model.training
    model.eval()
    read = model if wrapped is None else wrapped
    with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16, enabled=half):
        both = [read(branch_rows=rows, branch_shared=share) for rows, share in ((shared, True), (separate, False))]
        difference = (both[0] - both[1]).abs().mean().item()
    model.train(was_training)
    bound = max(ROUNDING[dtype], ROUNDING[torch.bfloat16] if half else 0.0)
    return None if difference <= bound else difference  # NaN is not within any bound
