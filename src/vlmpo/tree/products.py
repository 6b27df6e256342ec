"""Attend on a CPU in bfloat16 by matrix products, a few heads at a time.

There torch's SDPA takes up to twice as long, most of it backward: it converts tile by tile what matrix products read
as it is. As in it, scores and their softmax are float32. Heads are taken so few at a time that their scores stay in the
cache of a core. Probabilities are kept for the backward pass if they are small, as those of a tile are, else
made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TOWER_ATTENTION = "vlmpo_tower"  # the attention of vision layers

_KEPT = 10  # keys for each entry of a head up to which probabilities are kept: 2.5 times what attention keeps anyway
# Scores at a time, and the most of one segment: above it SDPA, which leaves out what a causal mask hides, is faster.
# Measured on two cores with avx512_bf16 at heads of 32, 64 and 128, 257 to 2000 tokens.
_SCORES = 2**20
_MOST_MASKED = 2**20
_MOST = 2**22


def can_attend(query: Tensor, key: Tensor, *, masked: bool) -> bool:
    """Return whether products are the faster way for these states; ``masked``: a mask hides half of the scores."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
        return False
    return query.shape[2] * key.shape[2] <= (_MOST_MASKED if masked else _MOST)


def keeps_probabilities(query: Tensor, key: Tensor) -> bool:
    """Return whether a vision layer on a CPU would keep all probabilities of these states for its backward pass."""
    by_products = query.shape[2] * key.shape[2] <= _MOST and query.dtype == torch.bfloat16
    return by_products and _few(query, key)


def _few(query: Tensor, key: Tensor) -> bool:
    """Return whether there are so few keys that their probabilities are kept."""
    return key.shape[2] <= _KEPT * query.shape[3]


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """Attend as SDPA does with ``enable_gqa``.

    Args:
        query: ``[batch, heads, queries, head]``; key, value: ``[batch, kv_heads, keys, head]``.
        hidden: ``[queries, keys]`` float32, added to the scores: -inf if a query does not see a key, else 0; None: all
            are seen.
        scaling: of the scores; None: ``head ** -0.5``.

    Returns:
        ``[batch, heads, queries, head]``, contiguous.
    """
    batch, heads, queries, size = query.shape
    together = batch * key.shape[1]  # the query heads of one key head are read with it, one below the other
    attended, _ = _Products.apply(
        query.reshape(together, -1, size),
        key.reshape(together, -1, size),
        value.reshape(together, -1, value.shape[3]),
        hidden,
        size**-0.5 if scaling is None else scaling,
        torch.is_grad_enabled() and _few(query, key),
    )
    return attended.view(batch, heads, queries, value.shape[3])


def tower_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend in a vision layer: by products if that is faster, by transformers' SDPA in every other case.

    Args:
        query: ``[batch, heads, tokens, head]``; key, value: ``[batch, kv_heads, tokens, head]``.
        arguments: whatever else the layer passes.

    Returns:
        ``[batch, tokens, heads, head]`` and None for the weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and not dropout and not causal and arguments.get("position_bias") is None
    if plain and can_attend(query, key, masked=False):
        return attend_by_products(query, key, value, None, scaling).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **arguments
    )


def register() -> None:
    """Register the attention of vision layers with transformers. A second call changes nothing."""
    AttentionInterface.register(TOWER_ATTENTION, tower_attention)
    AttentionMaskInterface.register(TOWER_ATTENTION, sdpa_mask)


class _Products(torch.autograd.Function):
    """Attention of ``[heads, queries, head]`` to ``[heads, keys, head]``; returns the probabilities too if ``keep``.

    Without them the backward pass computes them again.
    """

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scaling: float, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        scores = _Scores(query, key, hidden, scaling)
        out = query.new_empty((*query.shape[:2], value.shape[2]))
        kept = query.new_empty((*query.shape[:2], key.shape[1])) if keep else None
        for some in scores.blocks():
            probs = scores.probs(some, None if kept is None else kept[some])
            torch.bmm(probs, value[some], out=out[some])
        return out, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        query, key, value, hidden, ctx.scaling, _ = inputs
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # of the probabilities
        ctx.save_for_backward(query, key, value, hidden, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, key, value, hidden, out, kept = ctx.saved_tensors
        scores, grad = _Scores(query, key, hidden, ctx.scaling), grad.contiguous()
        # Softmax: each score's own part less the row's mean, which is the output times its gradient.
        means = (grad.float() * out.float()).sum(dim=2, keepdim=True)
        to_query, to_key, to_value = (torch.empty_like(states) for states in (query, key, value))
        for some in scores.blocks():
            probs = scores.probs(some) if kept is None else kept[some]
            torch.bmm(probs.mT, grad[some], out=to_value[some])
            with _in_bfloat16():
                to_scores = torch.baddbmm(means[some], grad[some].float(), value[some].float().mT, beta=-1)
            to_scores = to_scores.mul_(probs).to(query.dtype)
            torch.bmm(to_scores, key[some], out=to_query[some])
            torch.bmm(to_scores.mT, query[some], out=to_key[some])
        return to_query.mul_(ctx.scaling), to_key.mul_(ctx.scaling), to_value, None, None, None


@contextmanager
def _in_bfloat16() -> Iterator[None]:
    """Compute products of float32 matrices whose values are bfloat16's from these: exact, in half the time."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # since torch 2.9
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _Scores:
    """Makes the probabilities of a few heads at a time."""

    def __init__(self, query: Tensor, key: Tensor, hidden: Tensor | None, scaling: float) -> None:
        self._query, self._key, self._hidden, self._scaling = query, key, hidden, scaling

    def blocks(self) -> list[slice]:
        """Return which heads are taken together."""
        size = max(_SCORES // max(self._query.shape[1] * self._key.shape[1], 1), 1)
        return [slice(at, at + size) for at in range(0, self._query.shape[0], size)]

    def probs(self, some: slice, out: Tensor | None = None) -> Tensor:
        """Return the probabilities of these heads, ``[some, query heads * queries, keys]``, in ``out`` if given."""
        query, key = self._query[some].float(), self._key[some].float().mT
        with _in_bfloat16():
            scores = torch.baddbmm(query.new_empty(1), query, key, beta=0, alpha=self._scaling)
        if self._hidden is not None:
            scores.view(-1, *self._hidden.shape).add_(self._hidden)  # of every query head
        probs = torch.softmax(scores, dim=2)
        return probs.to(self._query.dtype) if out is None else out.copy_(probs)
