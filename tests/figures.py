"""Figures of long runs in the documentation: each in a block of its own, written by the run and by nobody else."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def fill(page: Path, block: str, text: str) -> None:
    """Put ``text`` between ``<!-- BLOCK -->`` and ``<!-- end of BLOCK -->`` of a page."""
    begin, end = f"<!-- {block} -->\n", f"<!-- end of {block} -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no block {block}")
    page.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}", encoding="utf-8")


def machine() -> str:
    """On what the figures were taken, without naming it."""
    return f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.system()}"
