"""Estimate what rows take without a GPU and without weights: the model runs on torch's meta device, shapes alone.

The model is made from its config at its full size and read forward and backward as training reads it, operation by
operation; only memory is missing. Attention stands in for the kernels of a GPU, which keep queries, keys, values and
their output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmpo import compat
from vlmpo.models.families import logit_scale_and_softcap
from vlmpo.models.kernels import USED, Functions, Kernels
from vlmpo.models.recompute import free_inputs_of_gradients
from vlmpo.models.vision import encode_images
from vlmpo.train.lengths import count_patch_pixels
from vlmpo.train.memory import LiveBytes, RowMemory, measure_rows
from vlmpo.tree.chunked_logprobs import CHUNK_ELEMENTS, LogitTransform, linear_token_logps, token_logps
from vlmpo.tree.layout import PackedRow, PromptTree, rows_of
from vlmpo.tree.products import keeps_probabilities
from vlmpo.tree.vision_blocks import can_read_in_blocks, read_in_blocks, vision_tower_of

_ATTENTION = "vlmpo_memory_estimate"
_CPU_TOWER = "vlmpo_memory_estimate_cpu_tower"
_META = torch.device("meta")


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, keeps_probabilities: bool) -> Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1])
        kept = [query.new_empty(batch, heads, tokens, dtype=torch.float32)]
        if keeps_probabilities:
            kept.append(query.new_empty(batch, heads, tokens, key.shape[2]))
        ctx.save_for_backward(query, key, value, out, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    out: Tensor = _Attention.apply(query, key, value, False)
    return out, None


def _attend_in_cpu_tower(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    out: Tensor = _Attention.apply(query, key, value, keeps_probabilities(query, key))
    return out, None


def meta_model(
    config: Any, dtype: torch.dtype, checkpointing: bool, every_n_layers: int = 1, offload: bool = False
) -> Any:
    """Make the model of ``config`` on the meta device, ready to be trained.

    Args:
        config: of a whole model, not changed.
        dtype: in which passes compute.
        checkpointing: whether layers' activations are computed again.
        every_n_layers: of which layers.
        offload: whether what enters these layers is kept in host memory.
    """
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionInterface.register(_CPU_TOWER, _attend_in_cpu_tower)
    kind: Any = AutoModelForImageTextToText if compat.is_image_text_config(config) else AutoModelForCausalLM
    with _META:
        # A copy: transformers writes the attention's name into the config, and would change the model it belongs to.
        model = kind.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=_ATTENTION)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every_n_layers)
        free_inputs_of_gradients(model)
        if offload:
            _keep_inputs_elsewhere(model)
    return model.train()


def _keep_inputs_elsewhere(model: Any) -> None:
    """Let recomputed layers keep no memory of what enters them, which a real run would keep on the host."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            compat.checkpoint_by(layer, _checkpoint_elsewhere)


def _checkpoint_elsewhere(checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
    def leave(tensor: Tensor) -> Callable[[], Tensor]:
        return partial(torch.empty, tensor.shape, dtype=tensor.dtype, device=_META)

    with torch.autograd.graph.saved_tensors_hooks(leave, lambda make: make()):
        return checkpoint(*args, **kwargs)


class _Gated(torch.autograd.Function):
    """Keeps what a fused gated product keeps, and computes nothing; its gradients lie over gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        return gate, up


class _Norm(torch.autograd.Function):
    """Keeps what a fused RMS norm keeps, and computes nothing; torch's own has no kernel for the meta device."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight, states.new_empty(states.shape[:-1], dtype=torch.float32))
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        states, weight, _ = ctx.saved_tensors
        return torch.empty_like(states), torch.empty_like(weight)


def _norm(states: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
    out: Tensor = _Norm.apply(states, weight)
    return out


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return query.view_as(query), key.view_as(key)  # in place


def _layer_norm(states: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return nn.functional.layer_norm(states, weight.shape, weight, bias, eps)


_KERNELS = Functions("shapes", "meta", _norm, _Gated.apply, _Gated.apply, _layer_norm, _rotate)


def estimate_with_kernels(model: Any) -> None:
    """Let a model from :func:`meta_model` keep what it keeps with fused kernels (vlmpo.models.kernels)."""
    Kernels(USED, _KERNELS).bind(model)


def estimate_rows(
    model: Any, pair: PromptTree, *, recompute: bool, shared: bool, device_type: str = "cuda"
) -> RowMemory:
    """Return what rows take with ``model``, from :func:`meta_model`; trained parameters require gradients.

    Args:
        model: from :func:`meta_model`.
        pair: the largest of some real pairs.
        recompute: whether the vision tower is read in blocks of tiles.
        shared: whether rows share prompts.
        device_type: of the device to train on: it decides how much of the vocabulary is read at once, and what vision
            layers keep.

    Raises:
        RuntimeError, ValueError, NotImplementedError, TypeError: the model asks for values, which there are none of.
    """
    if can_read_in_blocks(model):
        read_in_blocks(model, recompute)
    if getattr(model.config, "vision_config", None) is not None:
        model.set_attn_implementation({"vision_config": _CPU_TOWER if device_type == "cpu" else _ATTENTION})
    with compat.shapes_alone():
        return measure_rows(
            lambda trees: _read(model, trees, shared, CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"])),
            pair,
            tower=vision_tower_of(model),
            meter=LiveBytes(),
            patch_pixels=count_patch_pixels(model),
        )


def _read(model: Any, trees: Sequence[PromptTree], shared: bool, chunk_elements: int) -> Tensor:
    return torch.stack([_read_row(model, row, chunk_elements) for row in rows_of(trees, shared)]).sum()


def _read_row(model: Any, row: PackedRow, chunk_elements: int) -> Tensor:
    embeds = model.get_input_embeddings()(row.input_ids.to(_META))
    if row.vision:
        vision = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in row.vision.items()}
        features = encode_images(model.base_model, vision).pooler_output
        features = features if isinstance(features, Tensor) else torch.cat(list(features))
        mask = torch.zeros(embeds.shape, dtype=torch.bool, device=_META)
        embeds = embeds.masked_scatter(mask, features.to(embeds.dtype))
    positions = row.position_ids.to(_META)
    hidden = model.get_decoder()(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state[0]
    transform = LogitTransform(*logit_scale_and_softcap(model.config))
    scored, targets = row.logit_positions.to(_META), row.targets.to(_META)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return token_logps(hidden[scored], head, targets, chunk_elements, transform).sum()
    # The function behind: around it autocast is switched off, which knows no meta device.
    return linear_token_logps(hidden[scored], head.weight, head.bias, targets, chunk_elements, transform).sum()
