"""Keep tables that took long to make as Arrow files in the cache folder: checked, mapped, shared by processes.

The folder is ``$VLMPO_CACHE``, else ``vlmpo`` in ``$XDG_CACHE_HOME``, else ``~/.cache/vlmpo``. Any of it may be deleted
at any time. A file is an Arrow IPC stream, whose schema metadata hold its key, and the checksum of it all. It appears
whole or not at all; one that is damaged, cut off, or of another key or format is made anew. If the folder cannot be
written to, everything works, each time from the start.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlmpo import hashing
from vlmpo.data.index.columns import to_arrow, to_numpy
from vlmpo.hashing import content_hash

Arrays = dict[str, NDArray[Any]]

# Data sets smaller than this are read again in well under a second; they leave nothing behind.
MIN_BYTES = 8 << 20
_HASHED_WHOLE = 64 << 20
_ENDS = 64 << 10
_SAMPLES, _SAMPLE = 64, 4 << 10

_KEY = b"vlmpo"  # in the schema metadata
_CHECKSUM_BYTES = 16
_DAY = 86400.0


def cache_folder() -> Path:
    """Return the path of the cache folder, which may not exist yet."""
    if named := os.environ.get("VLMPO_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home and os.path.isabs(home) else Path.home() / ".cache") / "vlmpo"


@functools.lru_cache(maxsize=1)
def code_hash() -> str:
    """Return a hash of the code in ``vlmpo.data``. Cached results are invalidated when that code changes."""
    files = [Path(hashing.__file__), *sorted(Path(__file__).parents[1].rglob("*.py"))]
    versions = f"{version('vlmpo')} {sys.version_info[:2]} {sys.byteorder}"
    return content_hash(versions, *(path.read_bytes() for path in files))


@dataclass(frozen=True)
class Stamp:
    """Names files and the state they were seen in.

    An edit changes it if it changes a file's size or its time of modification or of change (which no program can set
    back), or, in files up to 64 MiB, any byte; in larger ones the first or last 64 KiB or one of 64 blocks of 4 KiB
    between. So an edit goes unnoticed only if the file has more than 64 MiB and keeps its size, the edit lies between
    those blocks, and the file system keeps no time of change, or the edit falls within one tick of its clock.
    """

    paths: tuple[str, ...]
    state: str

    @classmethod
    def of(cls, paths: Sequence[str]) -> Stamp | None:
        """Return the files' stamp; None if nothing is to be kept: no file, an unreadable one, less than MIN_BYTES."""
        absolute = tuple(os.path.abspath(path) for path in paths)
        try:
            if not absolute or sum(os.path.getsize(path) for path in absolute) < MIN_BYTES:
                return None
            return cls(absolute, _short_hash(*(_state(path) for path in absolute)))
        except OSError:
            return None

    def holds(self) -> bool:
        """Return whether the files are still as they were."""
        return Stamp.of(self.paths) == self


def _state(path: str) -> str:
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        if size <= _HASHED_WHOLE:
            spans = [(0, size)]
        else:
            between = np.linspace(_ENDS, size - _ENDS - _SAMPLE, _SAMPLES).astype(int).tolist()
            spans = [(0, _ENDS), *((start, _SAMPLE) for start in between), (size - _ENDS, _ENDS)]
        digest = hashlib.blake2b(digest_size=16)
        for start, length in spans:
            file.seek(start)
            digest.update(file.read(length))
    return f"{size} {status.st_mtime_ns} {status.st_ctime_ns} {digest.hexdigest()}"


def _short_hash(*parts: str) -> str:
    return content_hash("\0".join(parts), size=12)


def ignore(*_: object) -> None:
    """Do nothing; for callbacks that the caller does not give."""


class Cache:
    """Keeps tables by what they were made from: files, their state, settings and code.

    Attributes:
        problem: why the folder cannot be used; None as long as it can.
    """

    def __init__(self) -> None:
        self.folder = cache_folder()
        self.problem: str | None = None

    @property
    def notices(self) -> list[str]:
        """Return one line for the user if the folder cannot be used, else none."""
        if self.problem is None:
            return []
        return [
            f"the cache folder {self.folder} cannot be used ({self.problem}): the data are read from the start every "
            "time; name another one in VLMPO_CACHE"
        ]

    def table(
        self,
        kind: str,
        stamp: Stamp | None,
        settings: Sequence[Any],
        make: Callable[[], pa.Table],
        waiting: Callable[[], None] = ignore,
    ) -> pa.Table:
        """Return the table made from some files under some settings, from the cache or by ``make``, then kept.

        If several processes need the same table, one makes it and the others wait.

        Args:
            kind: what the table holds.
            stamp: the files; None keeps nothing.
            settings: JSON values: all else that decides the result.
            make: makes the table.
            waiting: called once if another process is making such a table from these files.
        """
        if stamp is None:
            return make()
        path, key = self._place(kind, stamp, settings)
        if (kept := _read(path, key)) is not None:
            return kept
        with self._lock(f"{kind}-{_short_hash(*stamp.paths)}.lock", waiting):
            if (kept := _read(path, key)) is not None:  # made while this process waited
                return kept
            table = make()
            if self.problem is None and stamp.holds() and self._write(path, key, table):
                kept = _read(path, key)
        return table if kept is None else kept

    def find(self, kind: str, stamp: Stamp | None, settings: Sequence[Any]) -> Arrays | None:
        """Return the arrays that :meth:`keep` left; None if there are none."""
        table = None if stamp is None else _read(*self._place(kind, stamp, settings))
        return None if table is None else {name: to_numpy(table[name]) for name in table.column_names}

    def keep(self, kind: str, stamp: Stamp | None, settings: Sequence[Any], arrays: Arrays) -> None:
        """Keep arrays of one length made from some files under some settings, unless the files have changed."""
        if stamp is not None and stamp.holds():
            self._write(
                *self._place(kind, stamp, settings),
                pa.table({name: to_arrow(values) for name, values in arrays.items()}),
            )

    def _place(self, kind: str, stamp: Stamp, settings: Sequence[Any]) -> tuple[Path, str]:
        """Return the file of an entry, and the key that it must hold."""
        key = json.dumps([kind, code_hash(), stamp.paths, stamp.state, *settings])
        state = _short_hash(code_hash(), stamp.state)
        return self.folder / f"{kind}-{_short_hash(*stamp.paths)}-{state}-{_short_hash(key)}.arrow", key

    @contextlib.contextmanager
    def _lock(self, name: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold a lock that one process has at a time, and that the system releases if that process dies.

        On a file system without locks several processes may make the same thing, each whole.
        """
        try:
            import fcntl

            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / name, "ab")  # noqa: SIM115  closed below, which releases the lock
        except (OSError, ImportError) as error:
            if isinstance(error, OSError):
                self.problem = self.problem or str(error)
            yield
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks
            yield

    def _write(self, path: Path, key: str, table: pa.Table) -> bool:
        """Write an entry, return whether it is there now, and delete those of the same files in an earlier state."""
        partial = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(suffix=".partial", prefix=f"{path.stem}-", dir=self.folder)
            os.close(handle)
            _write_table(partial, table.replace_schema_metadata({_KEY: key}))
            os.replace(partial, path)
        except OSError as error:
            self.problem = str(error)
            if partial is not None:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
            return False
        files, state, _ = path.stem.rsplit("-", 2)
        for other in self.folder.glob(f"{files}-*"):
            with contextlib.suppress(OSError):
                is_abandoned = other.suffix == ".partial" and other.stat().st_mtime < time.time() - _DAY
                if is_abandoned or not other.name.startswith(f"{files}-{state}-"):
                    other.unlink()
        return True


def _write_table(path: str, table: pa.Table) -> None:
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    with open(path, "r+b") as file:
        checksum = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_CHECKSUM_BYTES)).digest()
        file.seek(0, os.SEEK_END)
        file.write(checksum)


def _read(path: Path, key: str) -> pa.Table | None:
    """Return the table of an entry, mapped and not writable; None if it is absent, damaged or of another key."""
    try:
        content = pa.memory_map(str(path)).read_buffer()
    except (OSError, ValueError):  # absent, or empty
        return None
    size = max(0, content.size - _CHECKSUM_BYTES)
    view = memoryview(content)
    if hashlib.blake2b(view[:size], digest_size=_CHECKSUM_BYTES).digest() != view[size:].tobytes():
        return None
    table = pa.ipc.open_stream(content.slice(0, size)).read_all()
    return table if table.schema.metadata[_KEY] == key.encode() else None
