"""A processor's settings, merged and checked once: transformers does so at every call, whatever it is called with.

Its processors check each field of each call's settings, twice over; of a call on one small image that is the largest
part. Every prompt of a run comes with the same few settings.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

from vlmpo import compat
from vlmpo.data.encode.processors import reads_images

KEPT = 64  # sets of settings: one to each number of tiles an image may take


class MergedSettings:
    """In place of a processor's ``_merge_kwargs``: what that gives, remembered by what it is given.

    Kept as bytes, so that whoever is given settings may write into them. Later changes to the processor's own defaults
    are not seen.
    """

    def __init__(self, merge: Callable[..., Any]) -> None:
        self._merge = merge
        self._kept: dict[bytes, bytes] = {}

    def __call__(self, *args: Any, tokenizer_init_kwargs: dict[str, Any] | None = None, **given: Any) -> Any:
        # The tokenizer's own settings, long and always the same, are no part of the key, but whether they count is.
        key = pickle.dumps((args, tokenizer_init_kwargs is None, given))
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            merged = self._merge(*args, tokenizer_init_kwargs=tokenizer_init_kwargs, **given)
            self._kept[key] = pickle.dumps(merged)
        return pickle.loads(self._kept[key])


def with_kept_settings(processor: Any) -> Any:
    """``processor`` with its settings merged once; it itself where it does not merge them as transformers does."""
    if not reads_images(processor) or compat.settings_merger(processor) is None:
        return processor
    quick, merge = copy.copy(processor), compat.settings_merger(processor)
    assert merge is not None
    compat.replace_settings_merger(quick, MergedSettings(merge))
    return quick
