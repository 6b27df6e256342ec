"""Write files atomically: a reader finds the whole file or none."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Replace the file ``path`` by ``text`` (UTF-8) in one step: a kill leaves the old file or the new one.

    Two processes may write at once: each has its own partial file. ``sync``: it is on the disk before it has its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        # A lone surrogate has no UTF-8 encoding; JSON writes its escape.
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def replace_json(path: Path, value: Any, *, sync: bool = False) -> None:
    """Replace the file ``path`` by ``value`` as indented JSON; see :func:`replace_text`."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", sync=sync)


def replace_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace the file ``path`` by ``records``, one JSON object a line; see :func:`replace_text`."""
    replace_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
