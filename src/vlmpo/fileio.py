"""Write files atomically: a reader finds the whole file or none. JSON is JSON, without NaN and Infinity."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` (UTF-8) in one step: a kill leaves the old file or the new one.

    Two processes may write at once: each has its own partial file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        # A lone surrogate has no UTF-8 encoding; JSON writes its escape.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def dump_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Return ``value`` as JSON that every reader takes: a number that is not finite, which JSON lacks, becomes null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_with_nulls(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_json(path: Path, value: Any) -> None:
    """Replace the file ``path`` by ``value`` as indented JSON; see :func:`replace_text` and :func:`dump_json`."""
    replace_text(path, dump_json(value, indent=1) + "\n")


def replace_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace the file ``path`` by ``records``, one JSON object a line; see :func:`replace_text`."""
    replace_text(path, "".join(dump_json(record) + "\n" for record in records))
