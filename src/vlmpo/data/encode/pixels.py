"""Takes an image processor's pixels as bytes, before it rescales and normalises, and does that step on the device.

As their last step, processors turn whole numbers from 0 to 255 into float32. If the device takes that step, a quarter
of the bytes goes through a worker's pipe and to the device, and the worker has one pass less over every tile. Padding
is zero AFTER normalising, which is no colour of a picture. Where a processor adds it differs by family:

- Idefics3 and SmolVLM mark it in ``pixel_attention_mask [prompts, pictures, height, width]``;
- Pixtral and Mistral 3 give ``image_sizes [images, 2]`` beside ``pixel_values [images, 3, height, width]``;
- LLaVA-NeXT and LLaVA-OneVision append pictures of zeros to an image's own, whose number follows from
  ``image_sizes``, the processor's grids and, if it is given, ``batch_num_images``.

There is no list of supported processors. Each is run with and without its last step on probe images, and gives bytes
only if the results are bit-equal.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmpo.data.encode.processors import image_token, reads_images
from vlmpo.errors import ModelError

_PIXELS, _MASK, _SIZES, _COUNTS = "pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images"
# The image processor's settings that leave its last step out, and a conversion that ``open_image`` has already done.
AS_BYTES = {"do_rescale": False, "do_normalize": False, "do_convert_rgb": False}
# Width and height of the probes of two prompts: several grids, several kinds of padding. The last one is black.
_PROBES = (((96, 32),), ((32, 96), (64, 64), (48, 32)))


@dataclass(frozen=True)
class PixelScale:
    """Takes the last step of an image processor, ``(x * rescale - mean) / std``, fused as transformers fuses it.

    Attributes:
        mean, std: of each colour, after rescaling.
        rescale: the factor of a byte.
        grids: each ``(height, width)`` an image may be scaled to, if it is cut into pictures by a grid (LLaVA-NeXT).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float
    grids: tuple[tuple[int, int], ...] = ()

    def pack(self, vision: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a processor called with ``AS_BYTES``, their pixels and mask as uint8.

        Raises:
            ModelError: pixels that are no whole numbers from 0 to 255.
        """
        packed, pixels = dict(vision), vision.get(_PIXELS)
        if pixels is not None and pixels.dtype != torch.uint8:  # some processors pad into a float tensor
            packed[_PIXELS] = pixels.to(torch.uint8)
            if not torch.equal(packed[_PIXELS].to(pixels.dtype), pixels):
                raise ModelError(
                    "the model's image processor gave pixels that are no bytes although it was to leave out rescaling "
                    "and normalising, and it did not do so with other images. Please report it"
                )
        if _MASK in vision:
            packed[_MASK] = vision[_MASK].to(torch.uint8)
        return packed

    def normalise(self, vision: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of one prompt, or of several merged ones, as the processor gives them: pixels in float32.

        Tensors whose pixels are no bytes are returned unchanged.
        """
        pixels = vision.get(_PIXELS)
        if pixels is None or pixels.dtype != torch.uint8:
            return vision
        normalised = {**vision, _PIXELS: self._normalise_pixels(pixels)}
        if _MASK in vision:
            normalised[_MASK] = vision[_MASK].long()
        padding = self._padding(vision)
        if padding is not None:
            normalised[_PIXELS].masked_fill_(padding, 0.0)
        return normalised

    def num_pictures(self, vision: dict[str, Tensor]) -> int:
        """Return the pictures in ``pixel_values [a, pictures, 3, height, width]`` that are no padding."""
        pixels = vision[_PIXELS]
        if _MASK in vision:
            return int(vision[_MASK].flatten(2).any(dim=-1).sum())
        return sum(self._pictures_of_images(vision)) if _SIZES in vision else pixels.shape[0] * pixels.shape[1]

    def _normalise_pixels(self, pixels: Tensor) -> Tensor:
        """Return ``[..., colours, height, width]``, or ``[patches, colours * rest]``, normalised, in float32."""
        colours, trailing = len(self.mean), (1, 1) if pixels.dim() > 2 else (1,)
        bytes_of_colours = (_in_bytes(values, self.rescale, pixels.device) for values in (self.mean, self.std))
        mean, std = (values.view(colours, *trailing) for values in bytes_of_colours)
        values = pixels.to(torch.float32)
        flat = values if pixels.dim() > 2 else values.view(values.shape[0], colours, -1)
        flat.sub_(mean).div_(std)
        return values

    def _padding(self, vision: dict[str, Tensor]) -> Tensor | None:
        """Return where ``pixel_values`` holds padding, as bool that broadcasts to its shape; None if nowhere."""
        pixels = vision[_PIXELS]
        if _MASK in vision:
            return vision[_MASK][:, :, None] == 0
        if _SIZES not in vision or pixels.dim() < 4:
            return None
        if pixels.dim() == 5:
            counts = torch.tensor(self._pictures_of_images(vision), device=pixels.device)
            return (torch.arange(pixels.shape[1], device=pixels.device) >= counts[:, None])[:, :, None, None, None]
        height, width = vision[_SIZES].to(pixels.device).unbind(1)
        below = torch.arange(pixels.shape[2], device=pixels.device) >= height[:, None]
        right = torch.arange(pixels.shape[3], device=pixels.device) >= width[:, None]
        return (below[:, :, None] | right[:, None, :])[:, None]

    def _pictures_of_images(self, vision: dict[str, Tensor]) -> list[int]:
        """Count each image's pictures: the whole and its grid's cells, or the whole alone if its prompt has several."""
        from transformers.image_processing_utils import select_best_resolution

        side = vision[_PIXELS].shape[-1]
        sizes = vision[_SIZES].tolist()
        images_of_prompts = vision[_COUNTS].tolist() if _COUNTS in vision else [1] * len(sizes)
        is_alone = [images == 1 for images in images_of_prompts for _ in range(images)]
        counts = []
        for size, alone in zip(sizes, is_alone, strict=True):
            height, width = select_best_resolution(size, list(self.grids)) if alone and self.grids else (0, 0)
            counts.append(1 + (height // side) * (width // side))
        return counts


@functools.cache  # a copy to a CUDA device would wait for all that the device still computes
def _in_bytes(values: tuple[float, ...], rescale: float, device: torch.device) -> Tensor:
    """Return ``values`` of rescaled pixels as those of bytes, on ``device``."""
    return (torch.tensor(values, device="cpu") * (1.0 / rescale)).to(device)


def pixel_scale(processor: Any) -> PixelScale | None:
    """Return how bytes become the pixels of ``processor``; None if it does not leave its last step out exactly."""
    if not reads_images(processor) or image_token(processor) is None:
        return None
    images = processor.image_processor
    if not (getattr(images, "do_rescale", False) and getattr(images, "do_normalize", False)):
        return None
    try:
        grids = tuple(
            (int(height), int(width)) for height, width in getattr(images, "image_grid_pinpoints", None) or ()
        )
        scale = PixelScale(tuple(images.image_mean), tuple(images.image_std), float(images.rescale_factor), grids)
        probes = zip(_probe(processor), _probe(processor, **AS_BYTES), strict=True)
        return scale if all(_equal(plain, scale.normalise(scale.pack(packed))) for plain, packed in probes) else None
    except Exception:  # whatever a family's processor raises at a keyword or at a probe: it then keeps its floats
        return None


def reads_alike(processor: Any, other: Any) -> bool:
    """Return whether two processors give bit-equal tensors for the probe images and their prompts."""
    try:
        return all(_equal(one, two) for one, two in zip(_probe(processor), _probe(other), strict=True))
    except Exception:  # as above
        return False


def _probe(processor: Any, **settings: Any) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of ``processor`` for each probe prompt, with the image processor under ``settings``."""
    random = np.random.default_rng(0)
    for sizes in _PROBES:
        noise = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
        if len(sizes) > 1:
            noise[-1][:] = 0
        text = "What is it?\n".join(["So:", *(f"{image_token(processor)} (here) " for _ in noise)])
        images = [Image.fromarray(pixels) for pixels in noise]
        encoded = processor(text=[text], images=[images], images_kwargs=settings, return_tensors="pt")
        yield {name: torch.as_tensor(value) for name, value in encoded.items()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )
