"""The fields that records of pairs and of questions share, read from lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlmpo.data.records import IMAGE_PLACEHOLDER
from vlmpo.errors import RecordError


def json_object(raw: bytes, origin: str, unit: str = "line") -> dict[str, Any]:
    """The object on one line, or in another ``unit``. Raises RecordError ``bad_json``."""
    remedy = "write one JSON object a line" if unit == "line" else "write a JSON object"
    try:
        record = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        detail = f"the {unit} is not valid JSON in UTF-8 ({error}); {remedy}"
        raise RecordError("bad_json", origin, detail) from error
    if not isinstance(record, dict):
        raise RecordError("bad_json", origin, f"the {unit} holds {json_kind(record)}; {remedy}")
    return record


def text_field(record: Mapping[str, Any], key: str, origin: str) -> str:
    """The string under ``key``. Raises RecordError ``missing_field``, or ``bad_json`` for half a character."""
    value = record.get(key)
    if not isinstance(value, str):
        what = f"must be a string, not {json_kind(value)}" if key in record else "is missing"
        raise RecordError("missing_field", origin, f"`{key}` {what}")
    return checked_text(value, key, origin)


def checked_text(value: str, key: str, origin: str) -> str:
    """``value``, which is under ``key``. Raises RecordError ``bad_json`` for half a character."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud83d" alone is JSON, but no tokenizer takes it
        detail = f"`{key}` holds half of a surrogate pair at character {error.start}; write the whole character"
        raise RecordError("bad_json", origin, detail) from error
    return value


def image_names(record: dict[str, Any], origin: str) -> list[str]:
    """The paths under ``image``, as written; none where it is absent. Raises RecordError ``missing_field``."""
    value = record.get("image")
    if value is None or value == "":
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        detail = f"`image` must be a path, a list of paths or null, not {json.dumps(value)[:80]}"
        raise RecordError("missing_field", origin, detail)
    return names


def place_images(question: str, images: int, origin: str) -> str:
    """The question with one placeholder an image; a single image that has none goes first.

    Raises RecordError ``placeholder_mismatch``.
    """
    placeholders = question.count(IMAGE_PLACEHOLDER)
    if images == 1 and placeholders == 0:
        return f"{IMAGE_PLACEHOLDER}\n{question}"
    if placeholders != images:
        detail = f"`question` has {placeholders} {IMAGE_PLACEHOLDER} for {images} images; write one where each stands"
        raise RecordError("placeholder_mismatch", origin, detail)
    return question


def json_kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
