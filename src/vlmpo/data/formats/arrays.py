"""Turn what NumPy, torch and pandas hand over into plain records: lists and images for arrays, None for NaN."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmpo.data.formats.base import RecordContext

_CHANNELS = (1, 3, 4)
_ACCEPTED = "pass 8-bit arrays (uint8, height x width x 3), PIL images, paths or encoded bytes"


def is_array(value: Any) -> bool:
    """Return whether ``value`` is a NumPy array or a torch tensor."""
    return isinstance(value, np.ndarray) or _is_tensor(value)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # who holds a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)


def plain(value: Any) -> Any:
    """Return a record with lists for arrays of one dimension, numbers for scalars and None for NaN, at any depth.

    Arrays of more dimensions stay: they may be images.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if is_array(value) and value.ndim < 2:
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and value != value else value


def array_images(value: Any, key: str, context: RecordContext) -> list[Image.Image]:
    """Return the image in an array, or the images in one of four dimensions.

    Args:
        value: uint8 [height, width], [height, width, channels], torch's [channels, height, width], or several of these.
        key: what messages call it.
        context: where the record comes from.

    Raises:
        RecordError: ``array_image`` if it is not of 8 bits, or of another shape.
    """
    if str(value.dtype).removeprefix("torch.") != "uint8" or value.ndim not in (2, 3, 4):
        what = f"an array of {value.dtype}, shape {tuple(value.shape)}"
        raise context.error("array_image", f"`{key}` is {what}: its scale or layout would be a guess; {_ACCEPTED}")
    if value.ndim == 4:
        return [image for item in value for image in array_images(item, key, context)]
    array = value.detach().cpu().numpy() if _is_tensor(value) else value
    if array.ndim == 3:
        first, last = array.shape[0] in _CHANNELS, array.shape[-1] in _CHANNELS
        if not first and not last:
            detail = (
                f"`{key}` is an array of shape {array.shape}, without a dimension of 1, 3 or 4 colours; {_ACCEPTED}"
            )
            raise context.error("array_image", detail)
        if first and (_is_tensor(value) or not last):  # torch puts the colours first, NumPy last
            array = array.transpose(1, 2, 0)
        if array.shape[-1] == 1:
            array = array[..., 0]
    return [Image.fromarray(np.ascontiguousarray(array))]


def refuse_numbers(items: Sequence[Any], key: str, context: RecordContext) -> None:
    """Raise RecordError ``array_image`` if a list of images is an image written as nested lists of numbers."""
    inner = items[0]
    depth = 0
    while isinstance(inner, list | tuple) and inner:
        inner, depth = inner[0], depth + 1
    if depth and isinstance(inner, int | float):
        detail = f"`{key}` is an image in nested lists of numbers; {_ACCEPTED}, or cast the column to datasets.Image()"
        raise context.error("array_image", detail)
