"""Remembers the last few encoded prompts: pairs of one prompt that follow each other decode its images once."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

KEPT = 4  # a prompt of 13 tiles of 448 pixels is 8 MB as bytes, in every worker


class EncodedPrompt(NamedTuple):
    """Holds a prompt as the model reads it; the attributes are those of an ``EncodedPair``."""

    prompt_ids: Tensor
    vision: dict[str, Tensor]
    token_types: dict[str, Tensor]
    tiles: int
    image_tokens: int


class PromptCache:
    """Remembers the last ``KEPT`` prompts whose images are all files.

    A file that changes is read again: it is identified by path, size and time of its last change. Callers must not
    write into the tensors they get.
    """

    def __init__(self) -> None:
        self._prompts: OrderedDict[Hashable, EncodedPrompt] = OrderedDict()

    def key(self, prompt: str, images: Sequence[Any], tiles: int) -> Hashable | None:
        """Return what identifies ``prompt`` with ``images`` within ``tiles``; None if it is not to be remembered."""
        files = [_file_version(image) for image in images]
        return None if not files or None in files else (prompt, tiles, *files)

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
        return {"_prompts": OrderedDict()}


def _file_version(image: Any) -> tuple[str, int, int] | None:
    """Return what identifies a file's content without reading it; None if ``image`` is not a readable path."""
    if not isinstance(image, str | os.PathLike):
        return None
    try:
        status = os.stat(image)
    except (OSError, ValueError):  # reported when the image is opened
        return None
    return os.fspath(image), status.st_mtime_ns, status.st_size
