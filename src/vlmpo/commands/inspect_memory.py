"""What ``vlmpo inspect`` says about memory: what weights and rows take on a card, before there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlmpo import compat
from vlmpo.commands.adapter_settings import lora_config
from vlmpo.errors import VlmpoError
from vlmpo.loss import needs_reference
from vlmpo.models.adapters import put_adapter_on, unwrap_peft
from vlmpo.models.loading import freeze_parts
from vlmpo.recipe import Recipe
from vlmpo.train.config import asked_precision
from vlmpo.train.device_memory import free_bytes, in_units
from vlmpo.train.lengths import count_patch_pixels
from vlmpo.train.memory import RowMemory
from vlmpo.train.memory_choice import MemoryChoice, Situation, full_row, room_of, settled
from vlmpo.train.memory_estimate import estimate_rows, estimate_with_kernels, meta_model
from vlmpo.tree.layout import PromptTree
from vlmpo.tree.packing import count_patches
from vlmpo.tree.vision_blocks import can_read_in_blocks, trains_tower

_GIB = 1024**3
_CONTEXT = 1.5 * _GIB  # what CUDA and its libraries take for themselves
# Rows of float32 weights under autocast take more than those of bf16 weights (measured: 66 to 52 GiB).
_AUTOCAST = 1.26
# Bytes a weight under quantisation, scales included.
_QUANTIZED = {"8bit": 1.1, "4bit": 0.6}
# Bytes a trained weight of an optimizer's states, by what is in its name; of all others two of a weight's size.
_STATES = {"8bit": 2.0, "4bit": 1.0, "sgd": 0.0, "adafactor": 0.1}


@dataclass(frozen=True)
class MemoryEstimate:
    """Holds what a run is estimated to take.

    Attributes:
        resident: bytes that do not depend on rows.
        parts: what they are for.
        total: bytes that the run can take in all.
        on_card: whether that is a card's memory; else the machine's.
        room: bytes there are for a row.
        peak: bytes that a row of the largest pair takes.
        largest: its tokens and patches.
        choice: what rows would hold.
    """

    resident: int
    parts: str
    total: int
    on_card: bool
    room: int
    peak: int
    largest: tuple[int, int]
    choice: MemoryChoice

    @property
    def fits(self) -> bool:
        """Whether a row of the largest pair fits."""
        return self.peak <= self.room

    @property
    def where(self) -> str:
        """Whose memory it is, and how much."""
        return f"{self.total / _GIB:.0f} GiB {'of the card' if self.on_card else 'that are free here'}"


def estimate_memory(
    recipe: Recipe, config: Any, pair: PromptTree, *, pairs_at_once: int, shared: bool, card: float | None
) -> MemoryEstimate:
    """Estimate what a run takes; arguments as of :func:`describe_memory`.

    Raises:
        VlmpoError: the recipe asks for what the model does not have.
        Exception: of any kind, from a model that asks for values, of which there are none.
    """
    precision = _precision(recipe, card)
    device = torch.device("cpu" if card is None and not _has_card(recipe) else "cuda")
    model = _model(recipe, config, precision, device)
    resident, parts = _resident(recipe, model, precision)
    base = unwrap_peft(model)
    in_blocks = can_read_in_blocks(base) and trains_tower(base)
    tokens, vision = recipe.training.get("max_tokens_per_row", "auto"), recipe.model.vision_memory
    situation = Situation(
        device,
        tokens,
        vision,
        pairs_at_once,
        in_blocks,
        can_measure=True,
        ranks_here=1,
        full_row=full_row(base.config.get_text_config().hidden_size),
    )
    total = _total(device, card)
    room = room_of(device, total - resident)
    largest = pair.num_tokens, count_patches(pair, count_patch_pixels(base))
    if device.type == "cuda" and recipe.model.kernels != "off":
        estimate_with_kernels(base)
    factor = _AUTOCAST if precision == "autocast" and recipe.model.dtype == "float32" else 1.0

    def look(recompute: bool) -> tuple[RowMemory, int]:
        memory = estimate_rows(base, pair, recompute=recompute, shared=shared, device_type=device.type)
        return memory.times(factor), room

    choice, memory = settled(situation, largest, look)
    assert memory is not None
    return MemoryEstimate(resident, parts, total, device.type == "cuda", room, memory.peak(*largest), largest, choice)


def describe_memory(
    recipe: Recipe, config: Any, pair: PromptTree, *, pairs_at_once: int, shared: bool, card: float | None
) -> tuple[list[str], int | None]:
    """Return lines on memory, and how many tokens a row will have; None if that is not known.

    Args:
        recipe: of the run.
        config: of its model.
        pair: the largest of the pairs that were encoded.
        pairs_at_once: pairs of a micro-batch.
        shared: whether rows share prompts.
        card: GiB of the card to train on; None: this machine's, or its free memory if it has none.
    """
    try:
        found = estimate_memory(recipe, config, pair, pairs_at_once=pairs_at_once, shared=shared, card=card)
    except VlmpoError:
        raise
    except Exception as error:  # of a family that asks for values; its data can be inspected all the same
        return [f"memory: not estimated for this model ({type(error).__name__})"], None
    lines = [f"memory: {in_units(found.resident)} of the {found.where} for {found.parts}"]
    choice, largest = found.choice, found.largest
    if not found.fits:
        needs = f"{in_units(found.peak)}, and there are {in_units(max(found.room, 0))} for a row"
        sizes = f"{largest[0]} tokens, {largest[1]} patches"
        return [*lines, f"memory: the largest pair here ({sizes}) does not fit: it takes about {needs}"], None
    took = f"the largest pair here takes about {in_units(found.peak)} of {in_units(found.room)}"
    lines.append(f"memory, estimated: {choice.line or took}")
    cost = choice.bound.cost_of(*largest)
    return lines, max((choice.bound.most or 0) * largest[0] // max(cost, 1), 1) if choice.bound.limits else None


def _has_card(recipe: Recipe) -> bool:
    return torch.cuda.is_available() and not recipe.training.get("use_cpu")


def _total(device: torch.device, card: float | None) -> int:
    """Return the bytes that a run can take in all."""
    if card is not None:
        return int(card * _GIB - _CONTEXT)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory - _CONTEXT)
    return free_bytes(device)


def _precision(recipe: Recipe, card: float | None) -> str:
    """Return how the run will read its weights, as vlmpo.train.precision decides it; a card is fast at bf16."""
    training = recipe.training
    asked = asked_precision(training.get("precision", "auto"), training.get("bf16"), bool(training.get("fp16")))
    if recipe.model.dtype != "float32" or recipe.model.quantize is not None:  # they cannot be masters
        return "autocast" if asked in ("bf16", "autocast") else "float32"
    if asked != "auto":
        return asked
    fast = card is not None or compat.has_fast_bf16(torch.device("cuda" if _has_card(recipe) else "cpu"))
    return "bf16" if fast else "float32"


def _model(recipe: Recipe, config: Any, precision: str, device: torch.device) -> Any:
    """Return the model without values, its parts frozen and its adapter on it as the recipe says."""
    training = recipe.training
    half = recipe.model.dtype == "bfloat16" or precision != "float32"
    checkpointing = any(training.get(key) for key in ("gradient_checkpointing", "activation_checkpointing"))
    names = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
    given = [training.get(name) or {} for name in names]
    every = max(settings.get("every_n_layers", 1) for settings in given)
    offload = device.type != "cpu" and any(settings.get("offload", False) for settings in given)
    model = meta_model(config, torch.bfloat16 if half else torch.float32, checkpointing, every, offload)
    freeze_parts(model, recipe.model.freeze)
    adapter = lora_config(recipe)
    return model if adapter is None else put_adapter_on(model, adapter).train()


def _resident(recipe: Recipe, model: Any, precision: str) -> tuple[int, str]:
    """Return the bytes that do not depend on rows, and what they are for."""
    rounded = precision == "bf16"  # its float32 weights are masters then
    size = 2 if recipe.model.dtype == "bfloat16" else 4
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = trained * size + frozen * _QUANTIZED.get(recipe.model.quantize or "", size)
    states = next((b for name, b in _STATES.items() if name in recipe.training.get("optim", "adamw")), 2.0 * size)
    kind = recipe.reference.kind
    copied = needs_reference(recipe.loss.weights) and (kind == "copy" or (kind == "auto" and recipe.model.lora is None))
    read = 2 * (frozen + trained) if rounded else weights  # what passes read; the reference holds nothing else
    total = weights + (read if rounded else 0) + (read if copied else 0) + trained * (size + states)
    parts = "weights, gradients, optimizer states" + (" and the reference" if copied else "")
    return int(total), parts
