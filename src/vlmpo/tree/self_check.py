"""Check at the start of a run that log-probabilities are those of the model itself, on one real pair."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmpo import compat
from vlmpo.errors import ModelError
from vlmpo.models.mode import in_mode
from vlmpo.tree.chunked_logprobs import wide
from vlmpo.tree.forward import accepted
from vlmpo.tree.layout import PackedRow

# Mean difference a token that rounding explains. A response that is read wrongly is off by tenths of a nat.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def check_rows(
    model: Any,
    shared: Sequence[PackedRow] | None,
    separate: Sequence[PackedRow],
    half: bool,
    wrapped: Any | None = None,
) -> float | None:
    """Compare the log-probabilities that training would read of one pair with those of the model's plain forward.

    Args:
        model: set up by ``install``, under no wrapper.
        shared: the pair on one prompt; None if the run does not share prompts.
        separate: the same responses, each in a row of its own.
        half: whether the run computes in a half-precision type by autocast.
        wrapped: what to call in the model's place: the wrapper that holds its weights.

    Returns:
        None if shared and separate rows agree to rounding, else the mean absolute difference in nats a token.

    Raises:
        ModelError: separate rows already differ from the plain forward. The model's family does something that is not
            known here, so every number would be wrong.
    """
    weight = model.get_output_embeddings().weight
    rounded = half or model._vlmpo.masters is not None
    bound = max(ROUNDING[weight.dtype], ROUNDING[torch.bfloat16] if rounded else 0.0)
    shortest = min(range(len(separate)), key=lambda at: separate[at].targets.numel())  # whole logits are large
    read = model if wrapped is None else wrapped
    autocast = torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=half)
    with torch.no_grad(), autocast, in_mode(model, training=False):
        apart = [read(packed_rows=[row], share_prompts=False) for row in separate]
        expected, rounding = plain_logps(model, separate[shortest], read)
        together = None if shared is None else read(packed_rows=shared, share_prompts=True)
    wrong = _mean_difference(apart[shortest], expected)
    if not bool(expected.isfinite().all()):
        name = compat.name_or_path(model.config) or type(model).__name__
        raise ModelError(
            f"model {name}: its own forward gives log-probabilities that are not finite "
            f"({'bfloat16' if rounded else weight.dtype}), though its weights are; it cannot be trained so, "
            "or its checkpoint is damaged"
        )
    if not wrong <= bound + rounding:  # NaN, of ours alone, is not within any bound
        raise ModelError(
            f"family {model.config.model_type!r} ({type(model).__name__}): log-probabilities read by vlmpo differ from "
            f"the model's own by {wrong:.3g} nats a token; it does something to its tokens or logits that is not known "
            "here, and would be trained wrongly. Please report it; a model of another family can be trained"
        )
    difference = 0.0 if together is None else _mean_difference(together, torch.cat(apart))
    return None if difference <= bound else difference


def plain_logps(model: Any, row: PackedRow, read: Any) -> tuple[Tensor, float]:
    """Return the log-probabilities of the scored tokens of ``row`` by the model's plain forward, from whole logits.

    vlmpo's attention, head and positions take no part.

    Args:
        model: under no wrapper.
        row: one tree of one response.
        read: what to call: the model, or the wrapper that holds its weights.

    Returns:
        The log-probs ``[scored]``, and by how much, in nats, rounding the logits to the model's type may move them: in
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
    logits = logits.to(wide(logits.dtype))
    return logits.gather(1, row.targets[:, None]).squeeze(1) - logits.logsumexp(dim=1), rounding


def _mean_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())
