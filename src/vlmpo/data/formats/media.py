"""Read images and videos of a record in all the forms of data sets: paths, bytes, ``{bytes, path}``, PIL images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from vlmpo.data.formats.base import RecordContext

MEDIA_KEYS = ("image", "images", "video", "videos")
_FORMS = "a path, encoded bytes, {bytes, path}, or a list of these"


def media_of(record: Mapping[str, Any], kind: str, context: RecordContext) -> tuple[Any, ...]:
    """Return the record's images or videos, in order, as absolute paths, bytes or PIL images. Opens none.

    Args:
        record: holds them under ``kind`` or its plural, one or a list; null, "" and [] are none.
        kind: ``image`` or ``video``.
        context: where the record comes from.

    Raises:
        RecordError: ``missing_field`` for an unknown form, ``missing_image`` or ``missing_video`` for a web address,
            ``ambiguous_field`` if both keys hold something.
    """
    given = [key for key in (kind, f"{kind}s") if not is_null(record.get(key)) and record[key] not in ("", [], ())]
    if len(given) > 1:
        raise context.error("ambiguous_field", f"holds `{kind}` and `{kind}s`: leave one of them")
    if not given:
        return ()
    value = record[given[0]]
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(medium(item, kind, given[0], context) for item in items)


def is_null(value: Any) -> bool:
    """Return whether ``value`` is None, or a mapping of nulls, which is how tables may store None."""
    return value is None or (isinstance(value, Mapping) and bool(value) and all(v is None for v in value.values()))


def medium(value: Any, kind: str, key: str, context: RecordContext) -> Any:
    """Return one image or video as :func:`media_of` does; messages call it ``key``."""
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if isinstance(value, Mapping) and value.get("path"):
        value = value["path"]
    if isinstance(value, bytes) or (kind == "image" and isinstance(value, Image.Image)):
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise context.error("missing_field", f"`{key}` must be {_FORMS}, not {value!r:.80}")
    return os.path.join(context.image_root, _local(value, kind, key, context))


def _local(path: str, kind: str, key: str, context: RecordContext) -> str:
    if path.startswith("file://"):
        return unquote(urlsplit(path).path)
    if path.startswith(("http://", "https://", "data:")):
        what = "a web address" if path.startswith("http") else "a data URL"
        detail = f"`{key}` is {what} ({path[:60]}); save it as a file and name that, or embed its bytes"
        raise context.error(f"missing_{kind}", detail)
    return path
