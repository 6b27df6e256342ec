"""Find images and videos of a record that nothing read: under a misspelt or unknown key, or in a message."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from PIL import Image

from vlmpo.data.formats.arrays import is_array
from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.media import MEDIA_KEYS, is_base64, is_empty, kind_of_key
from vlmpo.errors import shorten

_EXTENSIONS = (
    "png|jpe?g|jfif|gif|webp|bmp|tiff?|heic|heif|avif|svg|ico|ppm|jp2|mp4|m4v|mov|avi|mkv|webm|mpe?g|wmv|flv|3gp|ogv"
)
_PATH = re.compile(rf"[^\n]{{1,1024}}\.(?:{_EXTENSIONS})(?:[?#]\S*)?", re.IGNORECASE)
_MAX_PATH = 4096
# What is read of a message, and of an item of its content that is a text.
_MESSAGE_KEYS = frozenset({"role", "from", "content", "value"})
_TEXT_KEYS = frozenset({"type", "text"})


def refuse_unread_media(record: Mapping[str, Any], read: Collection[str], context: RecordContext) -> None:
    """Raise RecordError ``unread_media`` if a record of which no image or video was read seems to hold one.

    Args:
        record: the record.
        read: its keys that were read; messages under these are looked into.
        context: where the record comes from.
    """
    for key, value in record.items():
        if is_empty(value):
            continue
        where = next(_in_messages(key, value), None) if key in read else None
        if key not in read and (_is_misspelt(key) or looks_like_media(value)):
            where = key
        if where is not None:
            remedy = "name it `image`, `images`, `video` or `videos`, or take it out if the prompt shows none"
            detail = f"`{shorten(where)}` seems to hold an image or video, which would not be shown; {remedy}"
            raise context.error("unread_media", detail)


def looks_like_media(value: Any, levels: int = 8) -> bool:
    """Return whether a value may be an image or video: a path by its ending, an address, bytes, PIL, base64.

    Lists and mappings are looked into, ``levels`` deep.
    """
    if isinstance(value, str):
        if value.startswith(("data:image/", "data:video/")) or is_base64(value):
            return True
        return len(value) <= _MAX_PATH and _PATH.fullmatch(value.strip()) is not None
    if isinstance(value, list | tuple | Mapping):
        items = value.values() if isinstance(value, Mapping) else value
        return levels > 0 and any(looks_like_media(item, levels - 1) for item in items)
    if is_array(value):
        return value.ndim > 2 or "uint8" in str(value.dtype)
    return isinstance(value, Image.Image) or (isinstance(value, bytes) and bool(value))


def _in_messages(key: str, value: Any) -> Iterator[str]:
    """Yield where messages hold images or videos in a place that is not read."""
    messages = value if isinstance(value, list | tuple) else [value]
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            continue
        where = f"{key}[{at}]" if messages is value else key
        yield from _unread_parts(message, _MESSAGE_KEYS, where)
        content = message.get("content")
        for number, item in enumerate(content if isinstance(content, list | tuple) else ()):
            if isinstance(item, Mapping) and item.get("type") == "text":
                yield from _unread_parts(item, _TEXT_KEYS, f"{where}.content[{number}]")


def _unread_parts(part: Mapping[str, Any], read: Collection[str], where: str) -> Iterator[str]:
    for name, value in part.items():
        is_named = kind_of_key(name) is not None and not isinstance(value, int | float)
        if name not in read and not is_empty(value) and (is_named or _is_misspelt(name) or looks_like_media(value)):
            yield f"{where}.{name}"


@functools.lru_cache(maxsize=4096)
def _is_misspelt(key: str) -> bool:
    """Return whether one letter too many, too few, wrong or exchanged makes ``key`` of ``image``, ``video``, ..."""
    word = str(key).lower()
    return word not in MEDIA_KEYS and any(_one_edit(word, name) for name in MEDIA_KEYS)


def _one_edit(word: str, name: str) -> bool:
    if abs(len(word) - len(name)) > 1:
        return False
    start = 0
    while start < min(len(word), len(name)) and word[start] == name[start]:
        start += 1
    left, right = word[start:], name[start:]
    exchanged = left[:2] == right[:2][::-1] and left[2:] == right[2:]
    return left[1:] == right[1:] or left[1:] == right or left == right[1:] or exchanged
