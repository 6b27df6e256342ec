"""The last few encoded prompts, so that pairs of one prompt which come together decode and tile its images once."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from vlmpo.data.records import PreferencePair

# A prompt's token ids ``[prompt]``, its vision tensors and its tokens' types, ``[prompt]`` each.
EncodedPrompt = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]
KEPT = 4  # a prompt of 13 tiles of 448 pixels is 8 MB as bytes, in every worker


class PromptCache:
    """Remembers the last ``KEPT`` prompts whose images, one at least, are all files.

    A file that changes is read again: it is known by path, size and time of its last change. Whoever gets an encoded
    prompt must not write into its tensors.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, EncodedPrompt] = OrderedDict()

    def get(
        self, prompt: str, pair: PreferencePair, tiles: int, make: Callable[[str, PreferencePair], EncodedPrompt]
    ) -> EncodedPrompt:
        """``prompt`` encoded with the images of ``pair`` within ``tiles``, made where it is not remembered."""
        files = [_file(image) for image in pair.images]
        if not files or None in files:
            return make(prompt, pair)
        key = (prompt, tiles, *files)
        if key not in self._kept:
            self._kept[key] = make(prompt, pair)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def __getstate__(self) -> dict[str, Any]:
        """Workers start without: what is remembered here is of no use there."""
        return {"_kept": OrderedDict()}


def _file(image: Any) -> tuple[str, int, int] | None:
    """What tells a file's content, as far as can be told without reading it; None for what is no file."""
    if not isinstance(image, str | os.PathLike):
        return None
    try:
        found = os.stat(image)
    except OSError:  # told by whoever opens it
        return None
    return os.fspath(image), found.st_mtime_ns, found.st_size
