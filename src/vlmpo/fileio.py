"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Put ``text`` (UTF-8) in the place of ``path`` in one move: a kill leaves the old file or the new one.

    So do two who write at once: each has a partial file of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        # Half a surrogate pair has no UTF-8; its escape is what JSON writes for it.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def replace_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON in the place of ``path``; see :func:`replace_text`."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def replace_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Put ``records``, one JSON object a line, in the place of ``path``; see :func:`replace_text`."""
    replace_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
