"""Which image and video files are there: folders are listed once instead of asking for every file."""

from __future__ import annotations

import os
from collections.abc import Container

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.index.record_index import IMAGE, VIDEO, RecordIndex

THERE, ABSENT, NO_FILE = range(3)

# A folder of which fewer files are wanted is not listed: it may hold millions of others.
MIN_LISTED = 32


def presence(facts: RecordIndex, wanted: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """uint8 [media]: THERE (or embedded, or not wanted), ABSENT, or NO_FILE for something else of that name.

    As ``os.path.isfile`` has it, looked at now: images come and go without their annotations.
    """
    found = np.full(len(facts.keys), THERE, np.uint8)
    folders: dict[str, int] = {}
    paths = np.flatnonzero(wanted & ((facts.kinds == IMAGE) | (facts.kinds == VIDEO)))
    folder_of = np.fromiter(
        (folders.setdefault(path.rpartition(os.sep)[0], len(folders)) for path in facts.names.texts(paths)),
        np.int32,
        len(paths),
    )
    order = np.argsort(folder_of, kind="stable")
    ends = np.cumsum(np.bincount(folder_of, minlength=len(folders)))
    for folder, begin, end in zip(folders, [0, *ends.tolist()], ends.tolist(), strict=False):
        members = paths[order[begin:end]]
        names = [path.rpartition(os.sep)[2] for path in facts.names.texts(members)]
        listed = _files(folder or os.sep, set(names)) if len(names) >= MIN_LISTED else ()
        for at, name in zip(members.tolist(), names, strict=True):
            if name not in listed:
                found[at] = _state(facts.names.at(at))
    return found


def _files(folder: str, names: Container[str]) -> set[str]:
    """Those of ``names`` that are files in ``folder``; empty where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            # What a link leads to is looked up, for the wanted ones only.
            return {entry.name for entry in entries if entry.name in names and entry.is_file()}
    except (OSError, ValueError):
        return set()


def _state(path: str) -> int:
    """What the file system itself says: names that differ in case or form from the listed ones may be there too."""
    if os.path.isfile(path):
        return THERE
    return NO_FILE if os.path.exists(path) else ABSENT
