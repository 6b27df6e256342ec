"""Image features computed once for two models: policy and reference, where both have the same frozen vision tower.

Whoever reads a row first without gradient (the reference) leaves its features with the row's layout; who reads it next
(the policy) takes them from there, instead of running its own tower. Nothing is kept beyond that.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from vlmpo import compat
from vlmpo.models.families import family_of
from vlmpo.tree.layout import PackedRow

_PIXELS, _OUTPUTS = "pixel_values", "mm_encoder_outputs"
_ADAPTED = (".base_layer.", ".original_module.")  # how PEFT names what an adapter was put on
_READ = ("pooler_output", "deepstack_features")  # of a tower's output; layers' states would only take memory


def tower_of(model: Any) -> dict[str, Tensor] | None:
    """Weights and buffers of all that makes image features of ``model`` (under no wrapper), by name.

    That is everything but the text model and its vocabulary, so a projector too. None where the family is not known to
    take features, or where a tower behaves otherwise in training.
    """
    base = model.base_model
    known = family_of(model.config).takes_features
    if not known or _OUTPUTS not in inspect.signature(type(base).forward).parameters:
        return None
    if any(compat.is_batch_norm(module) for module in base.modules()):
        return None
    text = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    own = {id(tensor) for module in text for tensor in (*module.parameters(), *module.buffers())}
    named = [*base.named_parameters(), *base.named_buffers()]
    return {name: tensor for name, tensor in named if id(tensor) not in own}


def share_features(policy: Any, reference: Any, share: bool = True) -> bool:
    """Let two models (or one with itself, read as two) share image features; or not, where ``share`` is False.

    Args:
        policy, reference: set up by ``install``, under no wrapper.
        share: False takes it back.

    Returns:
        Whether they do: the policy's tower is frozen and equal to the reference's, bit by bit.
    """
    mine, theirs = (tower_of(model) if share else None for model in (policy, reference))
    shared = mine is not None and theirs is not None and _frozen_alike(mine, theirs)
    if policy is reference and mine is not None and any(part in f".{name}" for name in mine for part in _ADAPTED):
        shared = False  # read as the reference, its tower is without the adapter
    for model, tower in ((policy, mine), (reference, theirs)):
        model._vlmpo_tower = tuple((tower or {}).values()) if shared else None
    return shared


def _frozen_alike(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    if not mine or mine.keys() != theirs.keys() or any(tensor.requires_grad for tensor in mine.values()):
        return False
    return all(
        tensor is theirs[name]
        or (tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name].to(tensor.device)))
        for name, tensor in mine.items()
    )


def vision_arguments(model: Any, row: PackedRow) -> dict[str, Any]:
    """What the base model's forward is told of the row's images: vision tensors, or features in the pixels' place.

    Reads and changes ``row.layout.features``.
    """
    features, row.layout.features = row.layout.features, None
    tower = getattr(model, "_vlmpo_tower", None)
    if tower is None or _PIXELS not in row.vision:
        return dict(row.vision)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tower):  # thawed since
        return dict(row.vision)
    if features is None:
        if torch.is_grad_enabled():
            return dict(row.vision)
        features = row.layout.features = _encode(model.base_model, row.vision)
    rest = {name: tensor for name, tensor in row.vision.items() if name != _PIXELS}
    return {**rest, _OUTPUTS: {"image": features}}


def _encode(base: Any, vision: dict[str, Tensor]) -> Any:
    named = inspect.signature(type(base).get_image_features).parameters
    given = {name: tensor for name, tensor in vision.items() if name in named}
    found = base.get_image_features(**given, return_dict=True)
    return type(found)(**{name: value for name, value in found.items() if name in _READ})
