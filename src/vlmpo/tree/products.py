"""Attend on a CPU in bfloat16 by matrix products, a few heads at a time.

There torch's SDPA takes up to twice as long, most of it backward: it converts tile by tile what matrix products read
as it is. As in it, scores and their softmax are float32, and no scores are kept for the backward pass. Heads are taken
so few at a time that their scores stay in the cache of a core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TOWER_ATTENTION = "vlmpo_tower"  # the attention of vision layers

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


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """Attend as SDPA does with ``enable_gqa``.

    Args:
        query: ``[batch, heads, queries, head]``; key, value: ``[batch, kv_heads, keys, head]``.
        mask: ``[queries, keys]`` bool, True if a query sees a key; None: all are seen.
        scaling: of the scores; None: ``head ** -0.5``.

    Returns:
        ``[batch, heads, queries, head]``, contiguous.
    """
    batch, heads, queries, size = query.shape
    together = batch * key.shape[1]  # the query heads of one key head are read with it, one below the other
    attended: Tensor = _Products.apply(
        query.reshape(together, -1, size),
        key.reshape(together, -1, size),
        value.reshape(together, -1, value.shape[3]),
        mask,
        size**-0.5 if scaling is None else scaling,
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
    """Attention of ``[heads, queries, head]`` to ``[heads, keys, head]``, the probabilities computed again backward."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        scores = _Scores(query, key, mask, scaling)
        out = query.new_empty((*query.shape[:2], value.shape[2]))
        for some in scores.blocks():
            torch.bmm(scores.probs(some), value[some], out=out[some])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, value, mask, ctx.scaling = inputs
        ctx.save_for_backward(query, key, value, mask, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out = ctx.saved_tensors
        scores, grad = _Scores(query, key, mask, ctx.scaling), grad.contiguous()
        # Softmax: each score's own part less the row's mean, which is the output times its gradient.
        means = (grad.float() * out.float()).sum(dim=2, keepdim=True)
        to_query, to_key, to_value = (torch.empty_like(states) for states in (query, key, value))
        for some in scores.blocks():
            probs = scores.probs(some)
            torch.bmm(probs.mT, grad[some], out=to_value[some])
            to_scores = torch.bmm(grad[some], value[some].mT).float()
            to_scores = to_scores.sub_(means[some]).mul_(probs).to(query.dtype)
            torch.bmm(to_scores, key[some], out=to_query[some])
            torch.bmm(to_scores.mT, query[some], out=to_key[some])
        return to_query.mul_(ctx.scaling), to_key.mul_(ctx.scaling), to_value, None, None


class _Scores:
    """Makes the probabilities of a few heads at a time."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        self._query, self._key, self._dtype = query.float().mul_(scaling), key.float(), query.dtype
        self._hidden = None  # what is added to the scores of one key head, ``[query heads * queries, keys]``
        if mask is not None:
            hidden = torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
            self._hidden = hidden.repeat(query.shape[1] // mask.shape[0], 1)

    def blocks(self) -> list[slice]:
        """Return which heads are taken together."""
        size = max(_SCORES // max(self._query.shape[1] * self._key.shape[1], 1), 1)
        return [slice(at, at + size) for at in range(0, self._query.shape[0], size)]

    def probs(self, some: slice) -> Tensor:
        """Return the probabilities of these heads, ``[some, query heads * queries, keys]``."""
        query, key = self._query[some], self._key[some].mT
        scores = torch.bmm(query, key) if self._hidden is None else torch.baddbmm(self._hidden, query, key)
        return torch.softmax(scores, dim=2).to(self._dtype)
