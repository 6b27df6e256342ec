"""Read images and videos of a record in all the forms of data sets: paths, bytes, ``{bytes, path}``, base64, PIL."""

from __future__ import annotations

import base64
import binascii
import functools
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from PIL import Image

from vlmpo.data.formats.arrays import array_images, is_array, refuse_numbers
from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.paths import EMBEDDED, local_path
from vlmpo.data.records import BASE64_START, MAX_ENCODED_BYTES
from vlmpo.errors import shorten

MEDIA_KEYS = ("image", "images", "video", "videos")

_FORMS = "a path, encoded bytes, {bytes, path}, base64, or a list of these"
# Other names of the same thing, written in any case and with any separators: image_path, imageUrl, IMG_FILES.
_OTHER_NAMES = re.compile(r"(image|img|picture|photo|video)s?(?:(?:path|url|uri|file|filename|base64|b64)s?|bytes)?")
_NO_WORD = re.compile(r"[\W_]+")
_BASE64_START = re.compile(BASE64_START)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+=*\s*")
_MIN_BASE64 = 48
_STANDARD = str.maketrans("-_", "+/")  # from the alphabet of web addresses


class Media(NamedTuple):
    """Holds the images and videos of a record, and the keys that they were read from or would have been."""

    images: tuple[Any, ...]
    videos: tuple[Any, ...]
    keys: frozenset[str]


def read_media(record: Mapping[str, Any], context: RecordContext, *, by_other_names: bool = True) -> Media:
    """Return the images and videos of a record, in order, as absolute paths, bytes or PIL images. Opens none.

    They are under ``image`` or ``images``, ``video`` or ``videos``. If these hold nothing they are looked for under
    other names, such as ``image_path``, which beside an image that was read are metadata.

    Args:
        record: its images and videos are one or a list; null, "" and lists of these are none.
        context: where the record comes from.
        by_other_names: False if the record's messages hold images or videos themselves.

    Raises:
        RecordError: see :func:`media_of`; ``ambiguous_field`` if two keys hold different images or videos.
    """
    images, videos = media_of(record, "image", context), media_of(record, "video", context)
    if images or videos or not by_other_names:
        return Media(images, videos, frozenset(MEDIA_KEYS))
    found: dict[str, dict[str, tuple[Any, ...]]] = {"image": {}, "video": {}}
    for key, value in record.items():
        kind = kind_of_key(key)
        if kind is not None and key not in MEDIA_KEYS and (media := _items(value, kind, key, context)):
            found[kind][key] = media
    for named in found.values():
        first, *others = named or [""]
        for other in others:
            if named[other] != named[first]:
                raise context.error("ambiguous_field", f"holds `{first}` and `{other}`: leave one of them")
    images, videos = (next(iter(named.values()), ()) for named in found.values())
    return Media(images, videos, frozenset((*MEDIA_KEYS, *found["image"], *found["video"])))


def media_of(record: Mapping[str, Any], kind: str, context: RecordContext) -> tuple[Any, ...]:
    """Return the record's images or videos under ``kind`` (``image`` or ``video``) or its plural.

    Raises:
        RecordError: ``missing_field`` for an unknown form, ``missing_image`` or ``missing_video`` for a web address,
            ``undecodable_image`` or ``undecodable_video`` for bad base64, ``array_image`` for numbers that are no 8-bit
            image, ``ambiguous_field`` if both keys hold something, ``too_large`` for more than MAX_ENCODED_BYTES, or
            see :func:`vlmpo.data.formats.paths.local_path`.
    """
    one, several = (_items(record.get(key), kind, key, context) for key in (kind, f"{kind}s"))
    if one and several:
        raise context.error("ambiguous_field", f"holds `{kind}` and `{kind}s`: leave one of them")
    return one or several


def _items(value: Any, kind: str, key: str, context: RecordContext) -> tuple[Any, ...]:
    """Return one or several images or videos; none if ``value`` is empty, or a list of nothing but empty values."""
    if is_empty(value):
        return ()
    if isinstance(value, list | tuple):
        refuse_numbers(value, key, context)
        return tuple(medium(item, kind, key, context) for item in value)
    if kind == "image" and is_array(value):
        return tuple(array_images(value, key, context))
    return (medium(value, kind, key, context),)


@functools.lru_cache(maxsize=4096)
def kind_of_key(key: str) -> str | None:
    """Return ``image`` or ``video`` if a key names such a thing in any of the ways people write it, else None."""
    match = _OTHER_NAMES.fullmatch(_NO_WORD.sub("", str(key).lower()))
    return None if match is None else "video" if match.group(1) == "video" else "image"


def is_null(value: Any) -> bool:
    """Return whether ``value`` is None, or a mapping of nulls, which is how tables may store None."""
    return value is None or (isinstance(value, Mapping) and bool(value) and all(v is None for v in value.values()))


def is_empty(value: Any, levels: int = 8) -> bool:
    """Return whether ``value`` is null, or a text, bytes, list or mapping that holds nothing or only such values.

    What is nested deeper than ``levels`` is not empty.
    """
    if value is None or isinstance(value, str | bytes):  # the usual ones first: this is asked of every value
        return not value
    if levels == 0 or not isinstance(value, list | tuple | Mapping):
        return False
    return all(is_empty(item, levels - 1) for item in (value.values() if isinstance(value, Mapping) else value))


def medium(value: Any, kind: str, key: str, context: RecordContext) -> Any:
    """Return one image or video as :func:`media_of` does; messages call it ``key``."""
    if isinstance(value, str):
        return _of_text(value, kind, key, context)
    if isinstance(value, Mapping):
        encoded = next((value[name] for name in ("bytes", "base64", "data") if not is_empty(value.get(name))), None)
        if isinstance(encoded, str):
            return _decoded(encoded.rpartition(",")[2], kind, key, context)
        value = encoded if isinstance(encoded, bytes) else value.get("path") or value.get("url") or value
    if isinstance(value, bytes):
        _check_size(len(value), key, context)
    if isinstance(value, bytes) or (kind == "image" and isinstance(value, Image.Image)):
        context.forms.add(EMBEDDED)
        return value
    if kind == "image" and is_array(value):
        images = array_images(value, key, context)
        if len(images) == 1:
            return images[0]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise context.error("missing_field", f"`{key}` must be {_FORMS}, not {value!r:.80}")
    return _of_text(value, kind, key, context)


def _of_text(value: str, kind: str, key: str, context: RecordContext) -> Any:
    """Return the bytes of a data URL or of base64, else the path."""
    if not value:
        raise context.error("missing_field", f"`{key}` must be {_FORMS}, not an empty text")
    if value.startswith("data:"):
        head, _, payload = value.partition(",")
        return _decoded(payload, kind, key, context, in_base64=head.endswith(";base64"))
    if is_base64(value):
        return _decoded(value, kind, key, context)
    return local_path(value, kind, key, context)


def is_base64(text: str) -> bool:
    """Return whether ``text`` is an image or video file in base64, by how it begins."""
    return len(text) >= _MIN_BASE64 and bool(_BASE64_START.match(text)) and bool(_BASE64.fullmatch(text))


def _decoded(text: str, kind: str, key: str, context: RecordContext, in_base64: bool = True) -> bytes:
    """Return the bytes that base64 (either alphabet, line breaks and padding as they are) or %-escapes stand for."""
    _check_size(len(text) * 3 // 4 if in_base64 else len(text), key, context)
    context.forms.add(EMBEDDED)
    if not in_base64:
        return unquote_to_bytes(text)
    compact = "".join(text.split()).translate(_STANDARD).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        detail = f"`{key}` is not valid base64 ({error}): {shorten(text)}; write it again, or name a file"
        raise context.error(f"undecodable_{kind}", detail) from error


def _check_size(size: int, key: str, context: RecordContext) -> None:
    """Raise RecordError ``too_large`` for an embedded image or video above MAX_ENCODED_BYTES."""
    if size > MAX_ENCODED_BYTES:
        what = f"about {size / 1e6:.0f} MB, at most {MAX_ENCODED_BYTES >> 20} MiB are read"
        raise context.error("too_large", f"`{key}` embeds {what}; save it as a file and name that")
