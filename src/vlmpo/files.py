"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Put ``text`` (UTF-8) in the place of ``path`` in one move: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    # Half a surrogate pair has no UTF-8; its escape is what JSON writes for it.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


def replace_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON in the place of ``path``; see :func:`replace_text`."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
