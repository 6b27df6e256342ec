"""Which model families can share a trunk, and what each needs.

A family is on the list only when shared rows were tested against separate forwards. Every other one is read by
separate rows, one response a row: exact for any causal model, only slower.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmpo.errors import ModelError
from vlmpo.tree.forward import accepted
from vlmpo.tree.layout import Row

# Text towers whose layers attend causally, over everything or a window, with nothing else done to the scores.
CAUSAL_TEXT = frozenset(
    {
        "cohere",
        "gemma3_text",
        "granite",
        "llama",
        "ministral3",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_moe",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_moe",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
    }
)
# Families whose vision tower sees nothing of the row, and whose text tower is one of those above.
SHARED_FAMILIES = frozenset(
    {
        "gemma3",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
    }
)
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class Support:
    """Whether a model's rows may share trunks, and why not where they may not."""

    shared: bool
    reason: str


def support_for(config: Any) -> Support:
    """Judge a model by its config: ``shared`` rows, or separate ones with the reason."""
    family = config.model_type
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or []) - _KNOWN_LAYERS
    if kinds:
        return Support(
            False, f"its text tower has layers of kind {', '.join(sorted(kinds))}, whose state runs from token to token"
        )
    if family not in SHARED_FAMILIES and family not in CAUSAL_TEXT:
        return Support(False, f"family {family!r} is not on the list of those tested with shared rows")
    if text.model_type not in CAUSAL_TEXT:
        return Support(False, f"text tower {text.model_type!r} is not on the list of those tested with shared rows")
    if getattr(text, "use_bidirectional_attention", None):
        return Support(False, "its text tower attends in both directions")
    return Support(True, f"{family} with a {text.model_type} text tower")


# Mean difference a token that rounding explains. A branch that is read wrongly is off by tenths of a nat.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def check_rows(
    model: Any, shared: Sequence[Row] | None, separate: Sequence[Row], half: bool, wrapped: Any | None = None
) -> float | None:
    """The start-up check: are our log-probabilities those of the model itself, on one real pair?

    Args:
        model: set up by ``install``, under no wrapper.
        shared: the pair on one trunk; None where the run does not share.
        separate: the same responses, each on its own.
        half: whether the run computes in a half-precision type by autocast.
        wrapped: what to call in the model's place: the wrapper that holds its weights.

    Returns:
        None where shared and separate rows agree to rounding, else the mean absolute difference in nats a token.

    Raises:
        ModelError: separate rows already differ from the model's own forward. Its family does something that is not
            known here, so every number would be wrong.
    """
    weight = model.get_output_embeddings().weight
    bound = max(ROUNDING[weight.dtype], ROUNDING[torch.bfloat16] if half else 0.0)
    shortest = min(separate, key=lambda row: row.targets.numel())  # the one whose logits exist whole
    was_training = model.training
    model.eval()
    read = model if wrapped is None else wrapped
    try:
        with torch.no_grad(), torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=half):
            ours = {id(row): read(branch_rows=[row], branch_shared=False) for row in separate}
            own, rounding = own_logps(model, shortest, read)
            plain = torch.cat([ours[id(row)] for row in separate])
            together = plain if shared is None else read(branch_rows=shared, branch_shared=True)
    finally:
        model.train(was_training)
    wrong = _mean_difference(ours[id(shortest)], own)
    if not wrong <= bound + rounding:  # NaN is not within any bound
        raise ModelError(
            f"family {model.config.model_type!r} ({type(model).__name__}): log-probabilities read by vlmpo differ from "
            f"the model's own by {wrong:.3g} nats a token; it does something to its tokens or logits that is not known "
            "here, and would be trained wrongly. Please report it; a model of another family can be trained"
        )
    difference = _mean_difference(together, plain)
    return None if difference <= bound else difference


def own_logps(model: Any, row: Row, read: Any) -> tuple[Tensor, float]:
    """Log-probabilities of the scored tokens of ``row``, one tree of one branch, by the model's own forward.

    Logits and all: no attention, head or positions of ours. ``read`` is the model, or the wrapper that holds its
    weights.

    Returns:
        The log-probs ``[scored]``, and what rounding the logits to the model's type may move them by, in nats: in
        bfloat16 a logit of 60 is only known to a quarter.
    """
    scored = row.targets.numel()
    named = inspect.signature(type(model).forward).parameters
    arguments: dict[str, Any] = {"input_ids": row.input_ids, "use_cache": False, **row.vision}
    arguments |= accepted(model, row.token_types)
    if "logits_to_keep" in named:
        arguments["logits_to_keep"] = scored + 1
    logits = read(**arguments).logits[0, -scored - 1 : -1]  # [scored, vocabulary]
    rounding = float(logits.abs().amax(dim=1).float().mean()) * torch.finfo(logits.dtype).eps
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, row.targets[:, None]).squeeze(1) - logits.logsumexp(dim=1), rounding


def _mean_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())
