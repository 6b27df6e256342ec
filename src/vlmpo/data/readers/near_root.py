"""Find the folder that a wrong image root was meant to be, if it is near."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from vlmpo.data.formats.paths import is_below
from vlmpo.errors import RecordError

_MISSING = ("missing_image", "missing_video")
LOOKED_FOR = 3  # missing files by which another image root is known
_LEVELS_UP, _LEVELS_DOWN, _MOST_FOLDERS = 2, 3, 2000


def root_of(paths: Sequence[str], root: str) -> str | None:
    """Return the folder near ``root`` that holds what was missing below it; None if there is none, or nothing was.

    Args:
        paths: of missing files; the first few decide.
        root: an existing folder.
    """
    names = [os.path.relpath(path, root) for path in paths[:LOOKED_FOR] if is_below(path, root)]
    return find_root(root, names) if names else None


def with_root(error: RecordError, near: str) -> RecordError:
    """Return the error of a missing file with the folder that has its files; any other error as it is."""
    if error.reason not in _MISSING:
        return error
    return RecordError(error.reason, error.origin, f"{error.detail}; {has_files(near)}")


def has_files(near: str) -> str:
    """Return words on a folder that was found."""
    return f"its files are in {near}: name that as its image_root"


def no_folder(root: str) -> str:
    """Return words on an image root that does not exist, and the folder beside it that may be meant."""
    above, name = os.path.split(root)
    beside = [os.path.basename(folder) for folder in _folders(above, 1)][1:] if os.path.isdir(above) else []
    near = get_close_matches(name, beside, n=1)
    return f"image_root {root} is not a folder" + (f"; did you mean {os.path.join(above, near[0])}?" if near else "")


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


def _folders(top: str, levels: int = _LEVELS_DOWN) -> Iterator[str]:
    """Yield ``top`` and the folders below it, nearest first."""
    level = [top]
    for _ in range(1 + levels):
        yield from level
        below: list[str] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    below += sorted(entry.path for entry in entries if entry.is_dir() and entry.name[:1] != ".")
            except OSError:
                continue
        level = below
