"""Compute log-probabilities of targets under the vocabulary head, block by block of the vocabulary.

The logits of all scored tokens exist one block of vocabulary entries at a time. If a gradient is wanted, the first
blocks are kept up to a budget; the others are computed again in the backward pass. Each block owns its rows of the
weight, so its weight gradient is one product, written in place: nothing is summed over blocks, and no second buffer of
the weight's size exists. Only the gradient of the hidden states is summed, which is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

# Logits in a block, by device. On a CPU a block should stay in its cache (measured: benchmarks/head.py).
CHUNK_ELEMENTS = {"cpu": 512 * 1024, "cuda": 8 * 1024 * 1024}
_ALIGNED = 64  # columns: 128 bytes of bf16
KEPT_BYTES = 192 * 1024 * 1024  # logits kept from forward to backward, per call


@dataclass(frozen=True)
class LogitTransform:
    """Turns a projection ``x`` into logits: ``softcap * tanh(scale * x / softcap)``, or ``scale * x`` without a cap.

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


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which log-probs of a model in ``dtype`` are computed: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


class ScoringHead(nn.Linear):
    """Returns log-probs if its call is given labels, and logits otherwise.

    FSDP2 and ZeRO-3 gather a weight around the call of its module, so log-probs have to be computed inside that call.
    A plain ``nn.Linear`` becomes one by ``head.__class__ = ScoringHead``: the weight, the hooks and the names in the
    state dict stay as they are.
    """

    def forward(
        self,
        input: Tensor,
        head_labels: Tensor | None = None,
        chunk_elements: int = CHUNK_ELEMENTS["cpu"],
        logit_transform: LogitTransform = PLAIN,
    ) -> Tensor:
        """Return logits ``[..., vocabulary]``, or with ``head_labels`` ``[scored]`` their log-probs ``[scored]``."""
        if head_labels is None:
            return super().forward(input)
        return _linear_head_logps(self, input, head_labels, chunk_elements, logit_transform)


def token_logps(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    chunk_elements: int | None = None,
    logit_transform: LogitTransform = PLAIN,
) -> Tensor:
    """Return the log-probability of each target under the vocabulary head.

    Args:
        hidden: ``[scored, hidden]``, the states that predict the targets.
        head: the model's output embedding. A linear one takes the chunked path with its own backward. Any other module
            (a head under LoRA, a quantised one) is called chunk by chunk under checkpointing.
        targets: ``[scored]`` token ids.
        chunk_elements: logits alive at once; None: what suits the device.
        logit_transform: what the family does to the head's output.

    Returns:
        ``[scored]``, float32, or float64 for float64 models.
    """
    if hidden.shape[0] == 0:
        return hidden.sum(dim=1).to(wide(hidden.dtype))
    chunk_elements = chunk_elements or CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
    if isinstance(head, ScoringHead):
        logps: Tensor = head(
            hidden, head_labels=targets, chunk_elements=chunk_elements, logit_transform=logit_transform
        )
        return logps
    if type(head) is nn.Linear:
        return _linear_head_logps(head, hidden, targets, chunk_elements, logit_transform)

    def score(states: Tensor, labels: Tensor) -> Tensor:
        projected = head(states)
        logits = logit_transform.apply(projected.to(wide(projected.dtype)))
        return -cross_entropy(logits, labels, reduction="none")  # the gradient of gather() would add by atomics

    size = max(1, chunk_elements // int(getattr(head, "out_features", 32768)))
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(score, states, labels, use_reentrant=False) for states, labels in chunks])


def _linear_head_logps(
    head: nn.Linear, hidden: Tensor, targets: Tensor, chunk_elements: int, logit_transform: LogitTransform
) -> Tensor:
    kind = hidden.device.type
    hidden = hidden.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype)
    with torch.autocast(kind, enabled=False):
        return linear_token_logps(hidden, head.weight, head.bias, targets, chunk_elements, logit_transform)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk_elements: int,
    logit_transform: LogitTransform = PLAIN,
    kept_bytes: int | None = None,
) -> Tensor:
    """Return ``log softmax(transform(h W^T + b))[target]`` of each row, computed in float32 or better.

    Args:
        hidden: ``[scored, hidden]``, at least one row; its dtype is that of the products.
        weight, bias: ``[vocabulary, hidden]`` and ``[vocabulary]``, of any floating dtype.
        targets: ``[scored]`` token ids.
        chunk_elements: logits in a block.
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
    """Return the vocabulary entries of a block: all if ``most`` allows, else a multiple of _ALIGNED if that is not 0.

    Products of other widths are slow on tensor cores. And a block that is kept is aligned like one that is not, so
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
            log_sum = torch.logsumexp(logits, dim=1)
            total = log_sum if total is None else torch.logaddexp(total, log_sum)
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
            block_bias = None if bias is None else bias[block]
            projected = kept[number] if number < len(kept) else _project(hidden, weight[block], block_bias)
            excess = _excess(projected, total, targets, block, ctx.logit_transform)
            narrow = excess.to(hidden.dtype)
            if grad_hidden is not None:
                block_weight = weight[block].to(hidden.dtype)
                if grad_hidden.dtype == narrow.dtype:
                    grad_hidden.addmm_(narrow, block_weight)
                else:
                    grad_hidden += narrow @ block_weight
            if grad_weight is not None:
                if grad_weight.dtype == narrow.dtype:
                    torch.mm(narrow.t(), scaled, out=grad_weight[block])
                else:
                    grad_weight[block] = narrow.t() @ scaled
            if grad_bias is not None:
                grad_bias[block] = -(excess.t() @ grad)
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * -grad[:, None]).to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _excess(projected: Tensor, total: Tensor, targets: Tensor, block: slice, logit_transform: LogitTransform) -> Tensor:
    """Return ``-d log p[target] / d projection`` of a block, ``[scored, block]``.

    That is softmax less one-hot, through the logit transform.
    """
    logits = logit_transform.apply(projected.to(total.dtype))
    excess = (logits - total[:, None]).exp_()
    inside, column = _place(targets, block)
    at_target = excess.gather(1, column[:, None]) - inside[:, None].to(excess.dtype)
    excess.scatter_(1, column[:, None], at_target)  # one entry a row: nothing is summed
    return logit_transform.backward(excess, logits)


def _place(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return for each target whether it is in ``block``, and its column there; 0 if it is not."""
    inside = (targets >= block.start) & (targets < block.stop)
    return inside, torch.where(inside, targets - block.start, 0)


def _room_for_blocks(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: int, budget: int) -> Tensor:
    """Return room for logits, ``[blocks, scored, columns]``: as many whole blocks as ``budget`` bytes hold.

    It is one piece: a large piece goes back to the system when it is freed, many small ones would not.
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
