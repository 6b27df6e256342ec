"""Merge the processor's vision tensors of several prompts into those of one row, all images in order.

Nearly every family lists its tiles, images, patches or grids along dimension 0. The exceptions:

- LLaVA-NeXT and LLaVA-OneVision: ``pixel_values [images, patches, 3, height, width]``, zeros behind an image's own
  patches; the model counts those by ``image_sizes``.
- Pixtral and Mistral 3: ``pixel_values [images, 3, height, width]``, zeros right of and below an image, which the
  model cuts to its entry of ``image_sizes``.
- Idefics3 and SmolVLM: ``pixel_values [prompts, pictures, 3, height, width]`` and ``pixel_attention_mask [prompts,
  pictures, height, width]``: the pictures of one row are listed under one prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmpo.errors import ModelError

_PIXELS = "pixel_values"
_SIZES = "image_sizes"  # [images, 2]: a family that gives it reads no pixel beyond it, so zeros may be added there
_MASK = "pixel_attention_mask"  # a family that gives it lists pictures by prompt
# Dimensions that may differ between prompts if ``image_sizes`` gives each image's own, by rank of ``pixel_values``.
_PADDED = {4: (2, 3), 5: (1,)}


def merge_vision(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the vision tensors of one row, made of those of its prompts.

    Args:
        parts: the processor's tensors for each prompt, encoded alone; a prompt without images has none.

    Returns:
        The tensors by name. Pictures have the same features as in their prompt alone: zeros are added only if the model
        cuts them off again.

    Raises:
        ValueError: tensors of one name have shapes or dtypes that cannot be merged.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _merge(name, [part for part in parts if name in part]) for name in names}


def split_vision(merged: dict[str, Tensor], counts: Sequence[dict[str, int]]) -> list[dict[str, Tensor]]:
    """Return each prompt's part of what :func:`merge_vision` returned; zeros that were added stay.

    Args:
        merged: the vision tensors of a row.
        counts: how many entries of each tensor each of its prompts has, along :func:`item_dimension`.
    """
    parts: list[dict[str, Tensor]] = [{} for _ in counts]
    for name, tensor in merged.items():
        pieces = tensor.split([count[name] for count in counts if name in count], dim=item_dimension(name, merged))
        of_prompt = iter(pieces)
        for part, count in zip(parts, counts, strict=True):
            if name in count:
                part[name] = next(of_prompt)
    return parts


def refuse_bytes(pixels: Tensor | None) -> None:
    """Raise ModelError for pixels that are still bytes: some models would read 0 to 255 as normalised pixels."""
    if pixels is not None and pixels.dtype == torch.uint8:
        raise ModelError(
            "the model was given pixels as bytes; put their tensors through the encoder's pixel_scale.normalise() first"
        )


def item_dimension(name: str, names: Collection[str]) -> int:
    """Return the dimension along which the tensor ``name`` lists pictures, if ``names`` are those of a prompt."""
    return 1 if name in (_PIXELS, _MASK) and _MASK in names else 0


def _merge(name: str, parts: Sequence[dict[str, Tensor]]) -> Tensor:
    tensors = [part[name] for part in parts]
    item = min(item_dimension(name, part) for part in parts)
    by_prompt = item == 1
    may_pad = _PADDED.get(tensors[0].dim(), ()) if name == _PIXELS and all(_SIZES in part for part in parts) else ()
    if len({tensor.dim() for tensor in tensors}) == 1:
        tensors = [_padded(tensor, tensors, may_pad) for tensor in tensors]
    fixed = {tuple(size for at, size in enumerate(tensor.shape) if at != item) for tensor in tensors}
    if len({tensor.is_floating_point() for tensor in tensors}) > 1:  # torch.cat would read bytes as normalised pixels
        raise ValueError(f"the processor's {name} of several prompts are bytes of one and floats of another")
    if len(fixed) > 1 or (by_prompt and tensors[0].shape[0] != 1):
        shapes = ", ".join(str(tuple(part[name].shape)) for part in parts)
        raise ValueError(
            f"the processor's {name} of several prompts, of shapes {shapes}, cannot be in one row; "
            "set model.attention: separate, which reads one prompt a row"
        )
    return torch.cat(tensors, dim=item)


def _padded(tensor: Tensor, others: Sequence[Tensor], dimensions: Sequence[int]) -> Tensor:
    """Return ``tensor`` with zeros behind it in ``dimensions``, up to the largest of ``others``."""
    widths = [0] * (2 * tensor.dim())
    for at in dimensions:
        # torch's pad counts from the last dimension: (before, after) of each.
        widths[2 * (tensor.dim() - 1 - at) + 1] = max(other.shape[at] for other in others) - tensor.shape[at]
    return pad(tensor, widths) if any(widths) else tensor
