"""Every private name of another library that vlmpo uses, each with its reason.

Private names may change in any release, so no other module may use one, and ``tests/test_compat.py`` holds each to the
form it has in the tested versions: transformers 5.23, accelerate 1.15, torch 2.11. A new version that changes one
fails there, in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# ---- transformers: models, configs and processors ----


def image_token_counter(processor: Any) -> Callable[..., Any] | None:
    """Return the processor's function from image sizes to numbers of tokens, or None if it has none.

    ``_get_num_multimodal_tokens(image_sizes=[[height, width], ...], **settings)`` counts without reading an image.
    """
    count: Callable[..., Any] | None = getattr(processor, "_get_num_multimodal_tokens", None)
    return count


def settings_merger(processor: Any) -> Callable[..., Any] | None:
    """Return the function that merges and checks a processor's settings at each call, or None (``_merge_kwargs``)."""
    merge: Callable[..., Any] | None = getattr(processor, "_merge_kwargs", None)
    return merge


def replace_settings_merger(processor: Any, merge: Callable[..., Any]) -> None:
    """Make this one processor merge its settings by ``merge`` (``_merge_kwargs``)."""
    processor._merge_kwargs = merge
