"""Pixels as bytes: an image processor's output before it rescales and normalises, and that last step on the device.

Processors turn whole numbers from 0 to 255 into float32 as their last act. Left to the device, a quarter of the bytes
goes through a worker's pipe and to the device, and the worker has one pass less over every tile. Families differ in
where they add padding, which is zero AFTER normalising and so is no colour of a picture:

- Idefics3 and SmolVLM tell it by ``pixel_attention_mask [prompts, pictures, height, width]``;
- Pixtral and Mistral 3 by ``image_sizes [images, 2]`` beside ``pixel_values [images, 3, height, width]``;
- LLaVA-NeXT and LLaVA-OneVision have pictures of zeros behind an image's own, whose number follows from
  ``image_sizes``, the grids of the processor and, where it is given, ``batch_num_images``.

Which processors allow it is not a list: one is asked both ways about probe images, and trusted when all is bit-equal.
"""

from __future__ import annotations

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
# The image processor's keywords that leave its last step out, and a conversion that ``open_image`` has already done.
AS_BYTES = {"do_rescale": False, "do_normalize": False, "do_convert_rgb": False}
# Width and height of the probes, several of which make one prompt: other grids, other padding. The last one is black.
_PROBES = (((96, 32),), ((32, 96), (64, 64), (48, 32)))


@dataclass(frozen=True)
class PixelScale:
    """The last step of an image processor: ``(x * rescale - mean) / std``, fused as transformers fuses it.

    Attributes:
        mean, std: of each colour, after rescaling.
        rescale: what a byte is multiplied by.
        grids: ``(height, width)`` an image may be scaled to, where it is cut into pictures by a grid (LLaVA-NeXT).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float
    grids: tuple[tuple[int, int], ...] = ()

    def packed(self, vision: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a processor gave under ``AS_BYTES``, with pixels and their mask as uint8.

        Raises:
            ModelError: pixels that are no whole numbers from 0 to 255.
        """
        packed = dict(vision)
        if _PIXELS in vision:
            packed[_PIXELS] = _as_bytes(vision[_PIXELS])
        if _MASK in vision:
            packed[_MASK] = vision[_MASK].to(torch.uint8)
        return packed

    def restored(self, vision: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one prompt or of several merged ones as the processor gives them: pixels in float32.

        Tensors whose pixels are no bytes are given back as they are.
        """
        pixels = vision.get(_PIXELS)
        if pixels is None or pixels.dtype != torch.uint8:
            return vision
        restored = {**vision, _PIXELS: self._normalised(pixels)}
        if _MASK in vision:
            restored[_MASK] = vision[_MASK].long()
        padding = self._padding(vision)
        if padding is not None:
            restored[_PIXELS].masked_fill_(padding, 0.0)
        return restored

    def num_pictures(self, vision: dict[str, Tensor]) -> int:
        """Pictures in ``pixel_values [a, pictures, 3, height, width]`` that are no padding."""
        pixels = vision[_PIXELS]
        if _MASK in vision:
            return int(vision[_MASK].flatten(2).any(dim=-1).sum())
        return pixels.shape[0] * pixels.shape[1] if _SIZES not in vision else sum(self._own_pictures(vision))

    def _normalised(self, pixels: Tensor) -> Tensor:
        """``[..., colours, height, width]``, or ``[patches, colours * rest]``, to float32."""
        mean, std = (torch.tensor(values) * (1.0 / self.rescale) for values in (self.mean, self.std))
        colours, trailing = len(self.mean), (1, 1) if pixels.dim() > 2 else (1,)
        mean, std = (values.to(pixels.device).view(colours, *trailing) for values in (mean, std))
        values = pixels.to(torch.float32)
        flat = values if pixels.dim() > 2 else values.view(values.shape[0], colours, -1)
        flat.sub_(mean).div_(std)
        return values

    def _padding(self, vision: dict[str, Tensor]) -> Tensor | None:
        """Where ``pixel_values`` holds padding: bool, in a shape that broadcasts to its own. None: nowhere."""
        pixels = vision[_PIXELS]
        if _MASK in vision:
            return vision[_MASK][:, :, None] == 0
        if _SIZES not in vision or pixels.dim() < 4:
            return None
        if pixels.dim() == 5:
            own = torch.tensor(self._own_pictures(vision), device=pixels.device)
            return (torch.arange(pixels.shape[1], device=pixels.device) >= own[:, None])[:, :, None, None, None]
        height, width = vision[_SIZES].to(pixels.device).unbind(1)
        below = torch.arange(pixels.shape[2], device=pixels.device) >= height[:, None]
        right = torch.arange(pixels.shape[3], device=pixels.device) >= width[:, None]
        return (below[:, :, None] | right[:, None, :])[:, None]

    def _own_pictures(self, vision: dict[str, Tensor]) -> list[int]:
        """Pictures of each image: the whole and the cells of its grid, or the whole alone where a prompt has more."""
        from transformers.image_processing_utils import select_best_resolution

        side = vision[_PIXELS].shape[-1]
        sizes = vision[_SIZES].tolist()
        of_prompt = vision[_COUNTS].tolist() if _COUNTS in vision else [1] * len(sizes)
        cut = [images == 1 for images in of_prompt for _ in range(images)]
        counts = []
        for size, alone in zip(sizes, cut, strict=True):
            height, width = select_best_resolution(size, list(self.grids)) if alone and self.grids else (0, 0)
            counts.append(1 + (height // side) * (width // side))
        return counts


def _as_bytes(pixels: Tensor) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels
    packed = pixels.to(torch.uint8)  # some processors pad into a float tensor
    if not torch.equal(packed.to(pixels.dtype), pixels):
        raise ModelError(
            "the model's image processor gave pixels that are no bytes although it was to leave out rescaling and "
            "normalising, and it did not do so with other images. Please report it"
        )
    return packed


def pixel_scale(processor: Any) -> PixelScale | None:
    """How bytes become the pixels of ``processor``; None where it does not leave its last step out exactly."""
    if not reads_images(processor) or image_token(processor) is None:
        return None
    own = processor.image_processor
    if not (getattr(own, "do_rescale", False) and getattr(own, "do_normalize", False)):
        return None
    try:
        grids = tuple((int(height), int(width)) for height, width in getattr(own, "image_grid_pinpoints", None) or ())
        scale = PixelScale(tuple(own.image_mean), tuple(own.image_std), float(own.rescale_factor), grids)
        alike = (
            _equal(plain, scale.restored(scale.packed(packed)))
            for plain, packed in zip(_probed(processor), _probed(processor, **AS_BYTES), strict=True)
        )
        return scale if all(alike) else None
    except Exception:  # whatever a family's processor raises at a keyword or at a probe: it then keeps its floats
        return None


def reads_alike(processor: Any, other: Any) -> bool:
    """Whether two processors make the same of the probe images, and of the tokens that stand for them, bit by bit."""
    try:
        return all(_equal(one, two) for one, two in zip(_probed(processor), _probed(other), strict=True))
    except Exception:  # as above
        return False


def _probed(processor: Any, **settings: Any) -> Iterator[dict[str, Tensor]]:
    """What ``processor`` makes of each probe prompt, the image processor under ``settings``."""
    random = np.random.default_rng(0)
    for sizes in _PROBES:
        noise = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
        if len(sizes) > 1:
            noise[-1][:] = 0
        images = [Image.fromarray(pixels) for pixels in noise]
        text = "What is it?\n".join(["So:", *(f"{image_token(processor)} (here) " for _ in images)])
        given = processor(text=[text], images=[images], images_kwargs=settings, return_tensors="pt")
        yield {name: torch.as_tensor(value) for name, value in given.items()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )
