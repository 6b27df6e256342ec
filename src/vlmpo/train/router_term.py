"""The routers' load-balancing loss beside the terms of MPO."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmpo.loss import LossOutput
from vlmpo.train.batching import MicroBatch
from vlmpo.tree.layout import sum_by_response
from vlmpo.tree.router_loss import ResponseScores

TERM = "router_aux"


def read_policy(model: Any, part: MicroBatch, router_losses: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each response of ``part``, ``[responses]``, and its router loss where that is asked for."""
    if not router_losses:
        return sum_by_response(model(packed_rows=part.rows), part.rows), None
    scores = ResponseScores(*model(packed_rows=part.rows, router_losses=True))
    return sum_by_response(scores.token_logps, part.rows), scores.router_losses


def add_router_loss(
    output: LossOutput, losses: Tensor | None, part: MicroBatch, coefficient: float | None, num_pairs: float | None
) -> LossOutput:
    """``output`` with this part's share of the router loss: ``coefficient`` times the mean over all responses.

    Args:
        losses: ``[responses]`` of ``part``; None leaves ``output`` as it is.
        part: its pairs name the responses that count; whatever else was read does not.
        coefficient: the config's ``router_aux_loss_coef``.
        num_pairs: of the global batch; None: this part's own.
    """
    if losses is None or coefficient is None:
        return output
    named = [part.chosen] if part.rejected is None else [part.chosen, part.rejected]
    responses = len(named) * (len(part) if num_pairs is None else num_pairs)
    share = losses[torch.cat(named)].sum() / max(responses, 1.0)
    return replace(output, loss=output.loss + coefficient * share, terms={**output.terms, TERM: share.detach()})
