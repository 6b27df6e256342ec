"""Find the folder that a wrong image root was meant to be, if it is near."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

_LEVELS_UP, _LEVELS_DOWN, _MOST_FOLDERS = 2, 3, 2000


def find_root(root: str, names: Sequence[str]) -> str | None:
    """Return the nearest folder below which all files of ``names`` are; None if there is none near ``root``.

    Args:
        root: an existing folder, in which they are not. Looked at are the folders in it, then those beside it and
            beside the folder above; 2,000 of them at most, and no hidden ones.
        names: paths of files, relative to the folder that is sought.
    """
    seen = 0
    above = os.path.abspath(root)
    for _ in range(1 + _LEVELS_UP):
        for folder in _folders(above):
            seen += 1
            if seen > _MOST_FOLDERS:
                return None
            if all(os.path.isfile(os.path.join(folder, name)) for name in names):
                return folder
        above = os.path.dirname(above)
    return None


def _folders(top: str) -> Iterator[str]:
    """Yield ``top`` and the folders below it, nearest first."""
    level = [top]
    for _ in range(1 + _LEVELS_DOWN):
        yield from level
        below: list[str] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    below += sorted(entry.path for entry in entries if entry.is_dir() and entry.name[:1] != ".")
            except OSError:
                continue
        level = below
