"""Attend over a row so that each response sees its prompt and itself, and nothing else.

Prompt and first response together are plain causal attention. Every further response attends to ``[prompt, itself]``
with lower-right causal alignment. On CUDA, in half precision, that is one call for the whole row; elsewhere one call a
response. Either way there is no padding, and no dense mask over the row.

A sliding window is counted in logical positions: a response's first token is one position after the prompt's last one,
wherever in the row the response is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmpo.errors import ModelError
from vlmpo.tree.layout import RowLayout
from vlmpo.tree.segments import attend_as_one_op, in_segments
from vlmpo.tree.varlen import attend_in_one_call, can_read, kernel_for

ATTENTION_NAME = "vlmpo_shared_prompt"
LAYOUT_ARGUMENT = "vlmpo_layout"  # keyword of the model's forward that reaches every attention layer

# Keywords with which layers of some families change the attention scores.
_CHANGES_SCORES = ("softcap", "s_aux", "position_bias")


def layout_arguments(layout: RowLayout, input_ids: Tensor) -> dict[str, Any]:
    """Return the keywords of a model's forward by which its text layers read a row, chosen once for all layers.

    A mask of four dimensions is handed on as it is. Without one, transformers would look for packed documents in the
    position ids, for which it waits for the device, and would take a response for a new document.

    Args:
        layout: of the row.
        input_ids: ``[1, tokens]``, on the model's device.
    """
    layout.kernel = kernel_for(input_ids.device)  # not in a layer: the first call trains something small
    layout.parts = None if layout.kernel is None else layout.segments(input_ids.device)
    return {LAYOUT_ARGUMENT: layout, "attention_mask": input_ids[None, None]}


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
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if layout.parts is not None and can_read(layout, dtype, query.shape[3], window):
        # Under autocast rotated queries are float32 while values are not; SDPA would convert all to half precision.
        query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
        return attend_in_one_call(layout.kernel, query, key, value, layout.parts, scaling)[None], None
    if torch.compiler.is_compiling():
        # A compiled layer runs without autocast, whose conversions it has traced: none is inside of an operator.
        query, key, value = (states.to(dtype) for states in (query, key, value))
        return attend_as_one_op(query, key, value, layout, scaling, window), None
    return in_segments(query, key, value, layout, scaling, window).transpose(1, 2).contiguous(), None


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
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
