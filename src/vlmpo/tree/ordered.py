"""Gather and sum what the loss is made of in one order, so that the same numbers give the same bits in every run.

``index_add``, ``scatter_add`` and the gradient of indexing add by atomics on CUDA: in the order in which threads happen
to come. A reward is the difference of two log-probs in the thousands, so that shows. Here nothing is added by atomics,
forward or backward, and log-probs are summed in float64: float32 knows a sum of 3,000 only to 2e-4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmpo.tree.layout import PackedRow


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which log-probs are summed: float64, or float32 on a device that has no better."""
    return torch.float32 if device.type == "mps" else torch.float64


def scored_states(hidden: Tensor, row: PackedRow) -> Tensor:
    """Return the states that predict the row's scored tokens, ``[scored, hidden]``.

    Args:
        hidden: ``[tokens, hidden]``, the last states of the row.
        row: on the same device.
    """
    states: Tensor = _ScoredStates.apply(hidden, row.logit_positions, _shared_positions(row))
    return states


def _shared_positions(row: PackedRow) -> list[tuple[int, list[int]]]:
    """Return each position that predicts the first tokens of several responses, and their places among the scored."""
    shared = []
    place = responses = 0
    for span in row.layout.spans:
        if responses == row.num_responses:
            break  # what follows is not scored
        places = []
        for length in span.responses:
            places.append(place)
            place += length
        responses += len(places)
        if len(places) > 1:
            shared.append((span.start + span.prompt - 1, places))
    return shared


class _ScoredStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, positions: Tensor, shared: list[tuple[int, list[int]]]) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.tokens, ctx.shared = hidden.shape[0], shared
        return hidden.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        (positions,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.tokens, grad.shape[1])
        total.index_copy_(0, positions, grad)
        for position, places in ctx.shared:  # of which one row was copied, whichever: they are summed instead
            total[position] = torch.stack([grad[place] for place in places]).sum(dim=0)
        return total, None, None


class ResponseSums(torch.autograd.Function):
    """Sums the log-probs of each response, ``[scored]`` to ``[responses]`` of :func:`sum_dtype`.

    Its ``apply`` takes them, the number of each response's tokens, and for each token the response it belongs to.
    """

    @staticmethod
    def forward(ctx: Any, token_logps: Tensor, lengths: list[int], owners: Tensor) -> Tensor:
        ctx.save_for_backward(owners)
        ctx.dtype = token_logps.dtype
        # Halves are added until one column is left. Zeros behind a response change no sum of it, so that its order
        # depends on neither the longest response beside it nor its place in memory, as that of Tensor.sum() does.
        width = 1 << (max(lengths) - 1).bit_length()
        sums = token_logps.new_zeros(len(lengths), width, dtype=sum_dtype(token_logps.device))
        for line, part in zip(sums, token_logps.split(lengths), strict=True):
            line[: len(part)] = part
        while width > 1:
            width //= 2
            sums = sums[:, :width] + sums[:, width:]
        return sums.squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        (owners,) = ctx.saved_tensors
        return grad.to(ctx.dtype).index_select(0, owners), None, None


class Select(torch.autograd.Function):
    """Gives ``values[index]`` of a few values, ``[responses]``; pairs that share a response name it more than once.

    Its ``apply`` takes ``values`` and ``index``.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = values.shape[0]
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        (index,) = ctx.saved_tensors
        named = index[None] == torch.arange(ctx.count, device=index.device)[:, None]  # [values, selected]
        return torch.where(named, grad[None], 0).sum(dim=1), None
