"""Remembers the last few encoded prompts: pairs of one prompt that follow each other decode its images once."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from vlmpo.data.encode.images import orientation_of

KEPT = 4  # a prompt of 13 tiles of 448 pixels is 8 MB as bytes, in every worker


class EncodedPrompt(NamedTuple):
    """Holds a prompt as the model reads it; the attributes are those of an ``EncodedPair``."""

    prompt_ids: Tensor
    vision: dict[str, Tensor]
    token_types: dict[str, Tensor]
    tiles: int
    image_tokens: int


class PromptCache:
    """Remembers the last ``KEPT`` prompts with images.

    A file that changes is read again: it is identified by path, size and time of its last change. Encoded images and
    pictures in memory are identified by their content. Callers must not write into the tensors they get.

    Attributes:
        pictures: whether prompts with pictures in memory are remembered too: comparing one takes a tenth of encoding
            it, which pays only if pairs of a prompt follow each other.
    """

    def __init__(self) -> None:
        self.pictures = False
        self._prompts: OrderedDict[Hashable, EncodedPrompt] = OrderedDict()

    def key(self, prompt: str, images: Sequence[Any], tiles: int) -> Hashable | None:
        """Return what identifies ``prompt`` with ``images`` within ``tiles``; None if it is not to be remembered."""
        versions = [self._version(image) for image in images]
        return None if not versions or None in versions else (prompt, tiles, *versions)

    def _version(self, image: Any) -> Hashable | None:
        if isinstance(image, bytes):
            return image
        if isinstance(image, Image.Image):
            return _picture_version(image) if self.pictures else None
        return _file_version(image)

    def find(self, key: Hashable | None) -> EncodedPrompt | None:
        """Return the prompt with this key if it is remembered."""
        if key in self._prompts:
            self._prompts.move_to_end(key)
        return self._prompts.get(key)

    def add(self, key: Hashable | None, prompt: EncodedPrompt) -> None:
        """Remember ``prompt`` unless its key is None, and forget the one used longest ago."""
        if key is not None:
            self._prompts[key] = prompt
            if len(self._prompts) > KEPT:
                self._prompts.popitem(last=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the prompts out: workers start empty."""
        return {"pictures": self.pictures, "_prompts": OrderedDict()}


def _picture_version(image: Image.Image) -> Hashable | None:
    """Return what decides how a picture is read; None if it is a file that Pillow opened, or has transparent colours.

    To decode such a file is left to ``open_image``, which is careful with it.
    """
    if image.format is not None or image.mode != "RGB" or image.has_transparency_data:
        return None
    return image.size, orientation_of(image), image.tobytes()


def _file_version(image: Any) -> tuple[str, int, int] | None:
    """Return what identifies a file's content without reading it; None if ``image`` is not a readable path."""
    if not isinstance(image, str | os.PathLike):
        return None
    try:
        status = os.stat(image)
    except (OSError, ValueError):  # reported when the image is opened
        return None
    return os.fspath(image), status.st_mtime_ns, status.st_size
