"""Read images with the vision tower a few tiles at a time, and compute each block again in the backward pass.

A tower's activations are the largest part of a row's memory in small models: every patch of every tile, in every layer.
Read in blocks under torch's checkpointing, only one block's activations exist at a time, in the forward as in the
backward pass. No tile sees another one, so nothing changes but rounding; policy and reference read the same blocks, so
the first rewards stay 0.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmpo.models.families import family_of, part_of

BLOCK_TILES = 4
BLOCK_PATCHES = 4096  # for towers that list the patches of all images; a larger image is a block of its own

_PLAIN = "_vlmpo_plain_forward"


def vision_tower_of(model: Any) -> nn.Module | None:
    """Return the vision tower of ``model`` (under no wrapper), None if it has none under a known name."""
    towers = (child for name, child in model.base_model.named_children() if part_of(name) == "vision")
    return next(towers, None)


def can_read_in_blocks(model: Any) -> bool:
    """Return whether ``model``'s family, under no wrapper, is known to have a tower in which no tile sees another."""
    tower = vision_tower_of(model)
    return tower is not None and family_of(model.config).takes_features and _arguments_of(tower) is not None


def trains_tower(model: Any) -> bool:
    """Return whether a weight of ``model``'s vision tower trains; without that no activation of it is kept."""
    tower = vision_tower_of(model)
    return tower is not None and any(parameter.requires_grad for parameter in tower.parameters())


def read_in_blocks(model: Any, on: bool) -> None:
    """Let ``model`` (under no wrapper) read images in blocks, and compute them again if the tower trains; or not.

    A tower that is read in blocks does not checkpoint its layers as well: it would compute everything three times.
    """
    tower: Any = vision_tower_of(model)
    if on and _PLAIN not in vars(tower):
        setattr(tower, _PLAIN, tower.forward)
        tower.forward = types.MethodType(_in_blocks(type(tower).forward), tower)
        for module in tower.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
    elif not on and _PLAIN in vars(tower):
        plain = vars(tower).pop(_PLAIN)
        if getattr(plain, "__func__", None) is type(tower).forward:
            del tower.forward
        else:
            tower.forward = plain


def patches_of_a_block(tower: Any, vision: Mapping[str, Tensor], patch_pixels: int) -> int:
    """Return the patches that ``tower`` reads at a time of many images like those in ``vision``; 0: of all at once.

    Args:
        tower: from :func:`vision_tower_of`.
        vision: a prompt's vision tensors, by name; at least one picture or frame.
        patch_pixels: pixels of a patch.
    """
    if tower is None or _PLAIN not in vars(tower):
        return 0
    grid = next((tensor for name, tensor in vision.items() if name.endswith("grid_thw")), None)
    if grid is None:
        height, width = next(tensor for name, tensor in vision.items() if name.startswith("pixel_values")).shape[-2:]
        return BLOCK_TILES * (height * width // patch_pixels)
    sizes = grid.prod(dim=-1).tolist()
    sizes *= 1 + BLOCK_PATCHES // max(sum(sizes), 1)
    images = iter(sizes)
    return max(sum(itertools.islice(images, count)) for count in _runs(sizes, BLOCK_PATCHES))


def _arguments_of(tower: nn.Module) -> list[str] | None:
    """Return the names of the arguments of a tower's forward; None if it is none of those known here."""
    names = [name for name in inspect.signature(type(tower).forward).parameters if name != "self"]
    return names if "grid_thw" in names or "pixel_values" in names else None


def _in_blocks(plain: Any) -> Any:
    @functools.wraps(plain)  # the model may read the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = _arguments_of(self) or []
        arguments = dict(zip(names, args, strict=False)) | kwargs
        read = getattr(self, _PLAIN)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            # Dropout is off: there is no random state to keep.
            read = functools.partial(checkpoint, read, use_reentrant=False, preserve_rng_state=False)
        outputs = [read(**block) for block in _blocks(names, arguments)]
        # Pixtral puts the patches of all images behind one another in a batch of one.
        return outputs[0] if len(outputs) == 1 else _joined(outputs, 1 if "image_sizes" in names else 0)

    return forward


def _blocks(names: Sequence[str], arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments for each block of tiles or images."""
    pixels = names[0]
    if "grid_thw" in names:
        grid = arguments["grid_thw"]
        grids = grid.split(_runs(grid.prod(dim=-1).tolist(), BLOCK_PATCHES))
        sizes = [int(part.prod(dim=-1).sum()) for part in grids]
        for block, part in zip(arguments[pixels].split(sizes), grids, strict=True):
            yield {**arguments, pixels: block, "grid_thw": part}
        return
    total = arguments[pixels].shape[0]
    listed = {
        name: value
        for name, value in arguments.items()
        if (isinstance(value, Tensor) and value.dim() and value.shape[0] == total) or name == "image_sizes"
    }
    for start in range(0, total, BLOCK_TILES):
        part = slice(start, start + BLOCK_TILES)
        yield {**arguments, **{name: None if value is None else value[part] for name, value in listed.items()}}


def _runs(sizes: Sequence[int], most: int) -> list[int]:
    """Cut ``sizes`` into runs of a sum of at most ``most``, or of one; return how many each has."""
    counts: list[int] = []
    room = 0
    for size in sizes:
        if counts and size <= room:
            counts[-1] += 1
            room -= size
        else:
            counts.append(1)
            room = most - size
    return counts


def _joined(parts: Sequence[Any], dim: int) -> Any:
    """Join what a tower returned for each block: tensors, and outputs, lists and tuples of them."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts), dim=dim)
    if isinstance(first, dict):  # transformers' ModelOutput
        return type(first)(**{name: _joined([part[name] for part in parts], dim) for name in first})
    if isinstance(first, list | tuple):
        return type(first)(_joined(of_layer, dim) for of_layer in zip(*parts, strict=True))
    return first
