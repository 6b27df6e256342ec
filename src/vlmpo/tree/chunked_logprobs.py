"""Log-probabilities of targets under a linear vocabulary head, block by block of the vocabulary.

The logits of all scored tokens exist one block of vocabulary entries at a time. Where a gradient is wanted, the first
blocks are kept up to a budget; the others are computed again in the backward pass. A block of the vocabulary owns its
rows of the weight, so its weight gradient is one product, written where it belongs: nothing is summed over blocks, in
no dtype, and no second buffer of the weight's size exists. What is summed is the gradient of the hidden states, which
is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Logits of a block, by device. On a CPU a block should stay in its cache (measured: benchmarks/head.py).
CHUNK_ELEMENTS = {"cpu": 512 * 1024, "cuda": 8 * 1024 * 1024}
_ALIGNED = 64  # columns: 128 bytes of bf16
KEPT_BYTES = 192 * 1024 * 1024  # of logits kept from forward to backward, a call


@dataclass(frozen=True)
class LogitTransform:
    """``softcap * tanh(scale * x / softcap)`` of the projection ``x``; ``scale * x`` if there is no soft cap.

    Log-probabilities read from the bare projection of a family that scales or caps it would be silently wrong.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, projected: Tensor) -> Tensor:
        """Return the family's logits."""
        logits = projected if self.scale == 1.0 else projected * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient with respect to the projection.

        Args:
            grad: gradient with respect to ``logits``.
            logits: what ``apply`` returned.
        """
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap) ** 2)  # tanh' = 1 - tanh^2
        return grad if self.scale == 1.0 else grad * self.scale


PLAIN = LogitTransform()


def chunk_elements_for(device: torch.device) -> int:
    """Logits alive at once on ``device``, the kept ones not counted."""
    return CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk_elements: int,
    logit_transform: LogitTransform = PLAIN,
    kept_bytes: int | None = None,
) -> Tensor:
    """``log softmax(map(h W^T + b))[target]`` of each row, computed in float32 or better.

    Args:
        hidden: ``[scored, hidden]``, at least one row; its dtype is that of the products.
        weight, bias: ``[vocabulary, hidden]`` and ``[vocabulary]``, of any floating dtype.
        targets: ``[scored]`` token ids.
        chunk_elements: logits of a block.
        logit_transform: what the family does to the head's output.
        kept_bytes: logits kept for the backward pass; None: KEPT_BYTES.

    Returns:
        ``[scored]``.
    """
    columns = _columns(chunk_elements // hidden.shape[0], weight.shape[0])
    budget = KEPT_BYTES if kept_bytes is None else kept_bytes
    logps: Tensor = _TokenLogProbs.apply(hidden, weight, bias, targets, columns, budget, logit_transform)
    return logps


def _columns(most: int, vocabulary: int) -> int:
    """Vocabulary entries of a block: all of them where they fit, else a multiple of _ALIGNED where there are so many.

    Products of other widths are slow on tensor cores; and a block that is kept lies aligned like one that is not, so
    that the same kernel makes both: policy and reference start equal to the bit.
    """
    if most >= vocabulary:
        return vocabulary
    return max(1, most - most % _ALIGNED if most > _ALIGNED else most)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        columns: int,
        budget: int,
        logit_transform: LogitTransform,
    ) -> Tensor:
        picked = torch.zeros(targets.shape, dtype=wide(hidden.dtype), device=hidden.device)
        total: Tensor | None = None  # log of the sum of exponentials so far
        kept = _room_for_blocks(hidden, weight, bias, columns, budget if any(ctx.needs_input_grad[:3]) else 0)
        for number, at in enumerate(range(0, weight.shape[0], columns)):
            block = slice(at, min(at + columns, weight.shape[0]))
            out = kept[number] if number < len(kept) else None
            projected = _project(hidden, weight[block], bias if bias is None else bias[block], out)
            logits = logit_transform.apply(projected.to(picked.dtype))  # [scored, block]
            inside, column = _place(targets, block)
            picked = torch.where(inside, logits.gather(1, column[:, None]).squeeze(1), picked)
            own = torch.logsumexp(logits, dim=1)
            total = own if total is None else torch.logaddexp(total, own)
        assert total is not None
        ctx.save_for_backward(hidden, weight, bias, targets, total, kept)
        ctx.columns, ctx.logit_transform = columns, logit_transform
        return picked - total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        hidden, weight, bias, targets, total, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=total.dtype) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        grad_bias = torch.empty_like(bias) if wants_bias else None
        # The gradient of a row is scaled on its hidden state: [scored, hidden], not [scored, vocabulary], is touched.
        scaled = (hidden * -grad[:, None]).to(hidden.dtype)
        for number, at in enumerate(range(0, weight.shape[0], ctx.columns)):
            block = slice(at, min(at + ctx.columns, weight.shape[0]))
            own = None if bias is None else bias[block]
            projected = kept[number] if number < len(kept) else _project(hidden, weight[block], own)
            excess = _excess(projected, total, targets, block, ctx.logit_transform)
            narrow = excess.to(hidden.dtype)
            if grad_hidden is not None:
                _add_product(grad_hidden, narrow, weight[block].to(hidden.dtype))
            if grad_weight is not None:
                _set_product(grad_weight[block], narrow.t(), scaled)
            if grad_bias is not None:
                grad_bias[block] = -(excess.t() @ grad)
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * -grad[:, None]).to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _excess(projected: Tensor, total: Tensor, targets: Tensor, block: slice, logit_transform: LogitTransform) -> Tensor:
    """``-d log p[target] / d projection`` of a block, ``[scored, block]``: softmax less one-hot, through the map."""
    logits = logit_transform.apply(projected.to(total.dtype))
    excess = (logits - total[:, None]).exp_()
    inside, column = _place(targets, block)
    excess.scatter_add_(1, column[:, None], -inside[:, None].to(excess.dtype))
    return logit_transform.backward(excess, logits)


def _place(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """For each target whether it is in ``block``, and its column there; 0 where it is not."""
    inside = (targets >= block.start) & (targets < block.stop)
    return inside, torch.where(inside, targets - block.start, 0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which log-probs of a model in ``dtype`` are taken: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def _room_for_blocks(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: int, budget: int) -> Tensor:
    """``[blocks, scored, columns]``, as many whole blocks as ``budget`` bytes hold.

    In one piece: so much memory goes back to the system when it is freed, many small pieces of it would not.
    """
    kind = hidden.dtype if bias is None else wide(hidden.dtype)
    whole = weight.shape[0] // columns
    blocks = min(whole, budget // (hidden.shape[0] * columns * kind.itemsize))
    return hidden.new_empty((blocks, hidden.shape[0], columns), dtype=kind)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    narrow = weight.to(hidden.dtype).t()
    if bias is None:
        return torch.mm(hidden, narrow, out=out)
    return torch.add((hidden @ narrow).to(wide(hidden.dtype)), bias, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _set_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
