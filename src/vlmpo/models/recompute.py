"""Recompute layers in the backward pass: as many as memory asks for, of the text part and of the vision part.

transformers' ``every_n_layers`` counts the layers of both parts in one, and knows a half and a third but not two
thirds. Its flag on each layer allows any number of either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmpo.log import logger
from vlmpo.models.adapters import unwrap_peft

# What every call of torch's checkpoint is given: no layer draws random numbers (dropout is off, so that policy and
# reference read alike), so there is no state of them to keep.
_SETTINGS = {"use_reentrant": False, "preserve_rng_state": False}
_KNOWN = (*_SETTINGS, "every_n_layers", "offload", "determinism_check", "debug", "early_stop", "context_fn")


@dataclass(frozen=True)
class Recomputation:
    """Says how many layers are recomputed; they are spread evenly over their part.

    Attributes:
        text_layers, vision_layers: their numbers; more than there are stand for all.
        offload: keep what enters a recomputed layer in host memory; on a CPU it is there already.
    """

    text_layers: int = 0
    vision_layers: int = 0
    offload: bool = False


def layers_of(model: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the layers of a transformers or PEFT model that can be recomputed: of its text part, and all others."""
    whole = unwrap_peft(model)
    of_text = {id(module) for module in whole.get_decoder().modules()}
    layers = [module for module in whole.modules() if isinstance(module, GradientCheckpointingLayer)]
    text = [layer for layer in layers if id(layer) in of_text]
    return text, [layer for layer in layers if id(layer) not in of_text]


def set_recomputation(model: Any, choice: Recomputation) -> None:
    """Have ``model`` recompute as many layers as ``choice`` says while it trains, in place of what it does now.

    Raises:
        ValueError: the model's layers cannot be recomputed.
    """
    whole = unwrap_peft(model)
    if not (choice.text_layers or choice.vision_layers):
        whole.activation_checkpointing_disable()
        return
    whole.activation_checkpointing_enable(dict(_SETTINGS), offload=choice.offload and whole.device.type != "cpu")
    free_inputs_of_gradients(whole)
    for layers, count in zip(layers_of(whole), (choice.text_layers, choice.vision_layers), strict=True):
        for layer, chosen in zip(layers, spread(count, len(layers)), strict=True):
            layer.gradient_checkpointing = chosen  # type: ignore[assignment]


def free_inputs_of_gradients(model: Any) -> None:
    """Let no embedding's output require a gradient that no weight before it wants.

    transformers requires one wherever layers are recomputed, of the vision tower's patches too, as torch's re-entrant
    checkpoint needs it. A tower that is frozen would be recomputed and differentiated for nothing.
    """
    unwrap_peft(model).disable_input_require_grads()


def spread(count: int, total: int) -> list[bool]:
    """Return ``total`` flags, ``count`` of them set (all if there are not as many), as evenly as can be."""
    count = min(count, total)
    return [(at + 1) * count // total > at * count // total for at in range(total)]


def recomputation_settings(given: Mapping[str, Any] | None, device_type: str) -> dict[str, Any]:
    """Return ``activation_checkpointing_kwargs`` with its defaults; without ``offload`` on a CPU, where torch fails.

    Raises:
        ValueError: an unknown key, or a number of layers below 1.
    """
    settings = {**_SETTINGS, **(given or {})}
    for key in settings.keys() - set(_KNOWN):
        hint = "".join(f"; did you mean {match}?" for match in get_close_matches(key, _KNOWN, n=1))
        raise ValueError(f"activation_checkpointing_kwargs: unknown key {key!r}{hint}")
    every = settings.get("every_n_layers", 1)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"activation_checkpointing_kwargs: every_n_layers must be a number above 0, not {every!r}")
    if device_type == "cpu" and settings.pop("offload", False):
        logger.info("note: activation_checkpointing_kwargs.offload has no effect on a CPU")
    return settings
