"""Attend over a row so that each response sees its prompt and itself, and nothing else.

Prompt and first response together are plain causal attention. Every further response attends to ``[prompt, itself]``
with lower-right causal alignment. On CUDA, in half precision, that is one call for the whole row; elsewhere one call a
response. Either way there is no padding, and no dense mask over the row.

A sliding window is counted in logical positions: a response's first token is one position after the prompt's last one,
wherever in the row the response is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmpo.errors import ModelError
from vlmpo.tree.layout import RowLayout
from vlmpo.tree.varlen import attend_in_one_call, can_read, kernel_for

ATTENTION_NAME = "vlmpo_shared_prompt"
LAYOUT_ARGUMENT = "vlmpo_layout"  # keyword of the model's forward that reaches every attention layer

# Keywords with which layers of some families change the attention scores.
_CHANGES_SCORES = ("softcap", "s_aux", "position_bias")

_reading_a_row: ContextVar[bool] = ContextVar("vlmpo_reading_a_row", default=False)


@contextmanager
def reading_a_row(device: torch.device) -> Iterator[None]:
    """Build no mask in the body, which reads a row: its layout has all that the attention needs."""
    kernel_for(device)  # test the kernels here: the gradients of that must not run inside a checkpointed layer
    token = _reading_a_row.set(True)
    try:
        yield
    finally:
        _reading_a_row.reset(token)


def response_mask(**arguments: Any) -> Tensor | None:
    """Return None while a row is read; otherwise, as in ``generate``, the usual mask of SDPA."""
    return None if _reading_a_row.get() else sdpa_mask(**arguments)


def shared_prompt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend over a row of trees; without a layout use plain SDPA, so that ``generate`` works as usual.

    Args:
        query: ``[1, heads, tokens, head]``; key, value: ``[1, kv_heads, tokens, head]``.
        attention_mask: ignored if there is a layout.
        arguments: ``vlmpo_layout`` (RowLayout) and whatever else the layer passes.

    Returns:
        ``[1, tokens, heads, head]`` and None for the weights.

    Raises:
        ModelError: the layer is a vision layer, has dropout, or changes its scores in a way that is not supported (soft
            caps, sinks): the result would be wrong without notice.
    """
    layout: RowLayout | None = arguments.pop(LAYOUT_ARGUMENT, None)
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **arguments
        )
    _refuse_what_would_be_wrong(module, query, layout, dropout, arguments)
    window = arguments.get("sliding_window")
    kernel = kernel_for(query.device)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if kernel is not None and can_read(layout, dtype, query.shape[3], window):
        # Under autocast rotated queries are float32 while values are not; SDPA would convert all to half precision.
        query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
        return attend_in_one_call(kernel, query, key, value, layout, scaling)[None], None
    return _in_segments(query, key, value, layout, scaling, window).transpose(1, 2).contiguous(), None


def _in_segments(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scaling: float | None, window: int | None
) -> Tensor:
    """Attend by one SDPA call a segment, ``[1, heads, tokens, head]``."""
    groups = query.shape[1] // key.shape[1]
    grouped = groups > 1 and query.device.type == "cpu"  # there SDPA reads grouped heads without a copy
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attend = functools.partial(scaled_dot_product_attention, scale=scaling, enable_gqa=grouped)
    sizes = [size for span in layout.spans for size in (span.prompt + span.responses[0], *span.responses[1:])]
    # Split rather than sliced: the gradient of a split is one concatenation, that of a slice a row of zeros.
    segments = iter(zip(*(states.split(sizes, dim=2) for states in (query, key, value)), strict=True))
    pieces = []
    for span in layout.spans:
        first_query, first_key, first_value = next(segments)
        mask: Any = layout.prompt_mask(span, window, query.device)
        pieces.append(attend(first_query, first_key, first_value, attn_mask=mask, is_causal=mask is None))
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
                    attn_mask=_response_mask(layout, length, seen + length, window, query.device),
                )
            )
    return torch.cat(pieces, dim=2)


def _response_mask(layout: RowLayout, queries: int, keys: int, window: int | None, device: torch.device) -> Any:
    if window is not None and keys > window:
        return layout.response_mask(queries, keys, window, device)
    if device.type == "cuda":
        return causal_lower_right(queries, keys)  # dispatches to flash attention, which has this alignment
    return layout.response_mask(queries, keys, None, device)


def _refuse_what_would_be_wrong(
    module: torch.nn.Module, query: Tensor, layout: RowLayout, dropout: float, arguments: dict[str, Any]
) -> None:
    if not getattr(module, "is_causal", True):
        raise ModelError(
            f"{type(module).__name__} is not a causal text layer, but it called the attention for responses; "
            "set model.attention: separate in the recipe"
        )
    if dropout:
        raise ModelError("attention dropout is on; policy and reference must be read without dropout")
    unknown = sorted(name for name in _CHANGES_SCORES if arguments.get(name) is not None)
    if unknown:
        raise ModelError(
            f"{type(module).__name__} uses {', '.join(unknown)}, which the attention for responses does not support; "
            "set model.attention: separate in the recipe"
        )
    if query.shape[0] != 1 or query.shape[2] != layout.num_tokens:
        raise ModelError(f"the layout covers {layout.num_tokens} tokens, the layer was given {tuple(query.shape)}")


def register() -> None:
    """Register the attention with transformers under ATTENTION_NAME. A second call changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, shared_prompt_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, response_mask)
