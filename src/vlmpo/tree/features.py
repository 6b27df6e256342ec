"""Compute image features once for two models: policy and reference, if both have the same frozen vision tower.

The model that reads a row first, without gradient (the reference), stores its features in the row's layout. The one
that reads it next (the policy) uses and removes them instead of running its vision tower.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vlmpo import compat
from vlmpo.log import logger
from vlmpo.models.families import family_of
from vlmpo.models.masters import HALF
from vlmpo.models.vision import encode_images
from vlmpo.tree.layout import PackedRow

_PIXELS, _OUTPUTS = "pixel_values", "mm_encoder_outputs"
_ADAPTED = (".base_layer.", ".original_module.")  # how PEFT names what an adapter was put on
_READ = ("pooler_output", "deepstack_features")  # of a tower's output; layers' states would only take memory


def share_features(policy: Any, reference: Any, share: bool = True) -> bool:
    """Let two models share image features if that changes no number, and return whether they do.

    They do if the policy's tower is frozen and equal to the reference's, bit by bit. Call it again after other weights
    were loaded.

    Args:
        policy, reference: set up by ``install``, under no wrapper; the same model twice if an adapter makes the
            difference.
        share: False stops sharing. FSDP and DeepSpeed need that: their hooks would miss a tower that is called outside
            of its model's forward.
    """
    policy_tower, reference_tower = (tower_of(model) if share else None for model in (policy, reference))
    shared = False
    if policy_tower and reference_tower:
        # An adapted tower is another one when the same model is read as the reference, without its adapter.
        adapted = policy is reference and any(part in f".{name}" for name in policy_tower for part in _ADAPTED)
        shared = not adapted and _frozen_and_equal(policy_tower, reference_tower, policy._vlmpo.masters is not None)
    if shared and policy._vlmpo.frozen_tower is None:
        logger.info("the vision tower is frozen: image features are computed once a step, for policy and reference")
    for model, tower in ((policy, policy_tower), (reference, reference_tower)):
        model._vlmpo.frozen_tower = tuple((tower or {}).values()) if shared else None
    return shared


def tower_of(model: Any) -> dict[str, Tensor] | None:
    """Return the weights and buffers that make image features of ``model`` (under no wrapper), by name.

    They are all but the text model's, its embeddings' and its head's; the projector's are among them. None if the
    family does not take features, or if the model computes them differently in training (batch norm).
    """
    base = model.base_model
    known = family_of(model.config).takes_features
    if not known or _OUTPUTS not in inspect.signature(type(base).forward).parameters:
        return None
    if any(compat.is_batch_norm(module) for module in base.modules()):
        return None
    text = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    text_ids = {id(tensor) for module in text for tensor in (*module.parameters(), *module.buffers())}
    named = [*base.named_parameters(), *base.named_buffers()]
    return {name: tensor for name, tensor in named if id(tensor) not in text_ids}


def _frozen_and_equal(policy: dict[str, Tensor], reference: dict[str, Tensor], rounded: bool) -> bool:
    """Return whether two towers read alike; ``rounded``: the policy's float32 weights are masters of what is read."""
    if policy.keys() != reference.keys() or any(tensor.requires_grad for tensor in policy.values()):
        return False

    def equal(tensor: Tensor, other: Tensor) -> bool:
        if tensor is other:
            return True
        if rounded and isinstance(tensor, nn.Parameter) and tensor.dtype == torch.float32:
            tensor = tensor.to(HALF)
        return tensor.dtype == other.dtype and torch.equal(tensor, other.to(tensor.device))

    return all(equal(tensor, reference[name]) for name, tensor in policy.items())


def vision_arguments(model: Any, row: PackedRow) -> dict[str, Any]:
    """Return the base model's arguments for the row's images: vision tensors, or features in the pixels' place.

    Reads and changes ``row.layout.features``.
    """
    features, row.layout.features = row.layout.features, None
    tower = model._vlmpo.frozen_tower
    if tower is None or _PIXELS not in row.vision:
        return dict(row.vision)
    if torch.is_grad_enabled() and (features is None or any(tensor.requires_grad for tensor in tower)):
        return dict(row.vision)  # read first with gradient, or thawed since
    if features is None:
        features = row.layout.features = _encode(model.base_model, row.vision)
    rest = {name: tensor for name, tensor in row.vision.items() if name != _PIXELS}
    return {**rest, _OUTPUTS: {"image": features}}


def _encode(base: Any, vision: dict[str, Tensor]) -> Any:
    output = encode_images(base, vision)
    return type(output)(**{name: value for name, value in output.items() if name in _READ})
