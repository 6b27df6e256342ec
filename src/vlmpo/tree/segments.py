"""Attend over a row segment by segment: prompt and first response, then every further response.

A compiler would trace as many calls as a row has segments, and trace anew for every row. For it the whole row is one
operator, ``vlmpo::attend_in_segments``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from vlmpo.tree.layout import RowLayout
from vlmpo.tree.products import attend_by_products, can_attend


def in_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: RowLayout,
    scaling: float | None,
    window: int | None,
    masked: bool = False,
) -> Tensor:
    """Attend by one call a segment, of SDPA, or of :mod:`vlmpo.tree.products` if that is faster.

    Args:
        query: ``[1, heads, tokens, head]``; key, value: ``[1, kv_heads, tokens, head]``.
        layout: of the row.
        scaling: of the scores; None: ``head ** -0.5``.
        window: tokens that a token sees, itself among them; None: all.
        masked: give every further response an explicit mask, also on CUDA.

    Returns:
        ``[1, heads, tokens, head]``.
    """
    groups = query.shape[1] // key.shape[1]
    grouped = groups > 1 and query.device.type == "cpu"  # there SDPA reads grouped heads without a copy
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attend = functools.partial(_attend_to_segment, layout=layout, scaling=scaling, grouped=grouped)
    sizes = [size for span in layout.spans for size in (span.prompt + span.responses[0], *span.responses[1:])]
    # Split rather than sliced: the gradient of a split is one concatenation, that of a slice a row of zeros.
    segments = iter(zip(*(states.split(sizes, dim=2) for states in (query, key, value)), strict=True))
    pieces = []
    for span in layout.spans:
        first_query, first_key, first_value = next(segments)
        mask: Any = layout.prompt_mask(span, window, query.device)
        if mask is None and can_attend(first_query, first_key, masked=True):
            tokens = first_query.shape[2]
            mask = layout.response_mask(tokens, tokens, None, query.device)
        pieces.append(attend(first_query, first_key, first_value, mask))
        # A response's first token sees the last ``window - 1`` tokens of the prompt, those after it fewer.
        seen = span.prompt if window is None else min(span.prompt, window - 1)
        prompt_key, prompt_value = (
            states[:, :, span.prompt - seen : span.prompt] for states in (first_key, first_value)
        )
        for length in span.responses[1:]:
            response_query, response_key, response_value = next(segments)
            pieces.append(
                attend(
                    response_query,
                    torch.cat([prompt_key, response_key], dim=2),
                    torch.cat([prompt_value, response_value], dim=2),
                    _response_mask(layout, length, seen + length, window, query.device, masked),
                )
            )
    return torch.cat(pieces, dim=2)


def _attend_to_segment(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, *, layout: RowLayout, scaling: float | None, grouped: bool
) -> Tensor:
    """Attend under ``mask``; None: causally."""
    if mask is not None and can_attend(query, key, masked=True):
        return attend_by_products(query, key, value, layout.hidden(mask), scaling)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _response_mask(
    layout: RowLayout, queries: int, keys: int, window: int | None, device: torch.device, masked: bool
) -> Any:
    if window is not None and keys > window:
        return layout.response_mask(queries, keys, window, device)
    if device.type == "cuda" and not masked:
        return causal_lower_right(queries, keys)  # dispatches to flash attention, which has this alignment
    return layout.response_mask(queries, keys, None, device)


# ---- one operator, for a compiler ----


def attend_as_one_op(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scaling: float | None, window: int | None
) -> Tensor:
    """Do what :func:`in_segments` does, as one operator; return ``[1, tokens, heads, head]``."""
    attended: Tensor = _attend(query, key, value, layout.numbers, layout.blocks, scaling, window)
    return attended


@torch.library.custom_op("vlmpo::attend_in_segments", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: Tensor,
    blocks: Tensor | None,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    layout = RowLayout.from_numbers(numbers, blocks)
    return in_segments(query, key, value, layout, scaling, window, masked=True).transpose(1, 2).contiguous()


@torch.library.custom_op("vlmpo::attend_in_segments_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: Tensor,
    blocks: Tensor | None,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = RowLayout.from_numbers(numbers, blocks)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return in_segments(query, key, value, layout, scaling, window, masked=True).transpose(1, 2)

    # Autograd does not record inside of an operator.
    gradients_of: Any = torch.func.vjp(attend, query, key, value)[1]
    to_query, to_key, to_value = (gradient.contiguous() for gradient in gradients_of(grad))
    return to_query, to_key, to_value


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *row: Any) -> Tensor:
    one, heads, tokens, _ = query.shape
    return query.new_empty((one, tokens, heads, value.shape[3]))


@_attend_backward.register_fake
def _(grad: Tensor, *states_and_row: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (states.new_empty(states.shape) for states in states_and_row[:3])
    return query, key, value


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, numbers, blocks = ctx.saved_tensors
    return (*_attend_backward(grad, query, key, value, numbers, blocks, ctx.scaling, ctx.window), *4 * (None,))


_attend.register_autograd(_gradients, setup_context=_keep)
