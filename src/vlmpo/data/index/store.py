"""Arrays that took long to make, kept in files of the cache folder: checked, mapped, shared by processes and runs.

The folder is ``$VLMPO_CACHE``, else ``vlmpo`` in ``$XDG_CACHE_HOME``, else ``~/.cache/vlmpo``. Any of it may be deleted
at any time. A file appears whole or not at all, and holds a checksum: one that is damaged, cut off or of another key is
made anew. Where the folder cannot be written to, everything works, every time from the start.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.index.hashing import rules

Arrays = dict[str, NDArray[Any]]

# Data sets smaller than this are read again in well under a second; they leave nothing behind.
MIN_BYTES = 8 << 20
_HASHED_WHOLE = 64 << 20
_ENDS = 64 << 10
_SAMPLES, _SAMPLE = 64, 4 << 10

_MAGIC = b"vlmpo\0\0\1"
_DIGEST = 16
_ALIGN = 64
_DAY = 86400.0
_HEAD = len(_MAGIC) + _DIGEST + 8  # magic, checksum of all that follows, length of the JSON that names the arrays


def cache_folder() -> Path:
    """Where the cache lies; not made yet."""
    if named := os.environ.get("VLMPO_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home and os.path.isabs(home) else Path.home() / ".cache") / "vlmpo"


# ---- what a file is told by ----


@dataclass(frozen=True)
class Stamp:
    """Files and the state they were seen in.

    An edit changes it if it changes a file's size or its time of modification or of change (which no program can set
    back), or, in files up to 64 MiB, any byte; in larger ones the first or last 64 KiB or one of 64 blocks of 4 KiB
    between. So what is not noticed is an edit of a file above 64 MiB that keeps its size, lies between those blocks,
    and happens on a file system that keeps no time of change, or within the tick of its clock.
    """

    paths: tuple[str, ...]
    state: str

    @classmethod
    def of(cls, paths: Sequence[str]) -> Stamp | None:
        """None where nothing is to be kept: no file, a file that cannot be read, or less than MIN_BYTES in all."""
        named = tuple(os.path.abspath(path) for path in paths)
        try:
            if not named or sum(os.path.getsize(path) for path in named) < MIN_BYTES:
                return None
            return cls(named, _hex(*(_state(path) for path in named)))
        except OSError:
            return None

    def holds(self) -> bool:
        """Whether the files are still as they were."""
        return Stamp.of(self.paths) == self


def _state(path: str) -> str:
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        size = found.st_size
        if size <= _HASHED_WHOLE:
            spans = [(0, size)]
        else:
            between = np.linspace(_ENDS, size - _ENDS - _SAMPLE, _SAMPLES).astype(int).tolist()
            spans = [(0, _ENDS), *((start, _SAMPLE) for start in between), (size - _ENDS, _ENDS)]
        digest = blake2b(digest_size=16)
        for start, length in spans:
            file.seek(start)
            digest.update(file.read(length))
    return f"{size} {found.st_mtime_ns} {found.st_ctime_ns} {digest.hexdigest()}"


def _hex(*parts: str) -> str:
    return blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


# ---- the files of the cache ----


class Cache:
    """Arrays by what they were made from.

    Attributes:
        problem: why the folder cannot be used; None as long as it can.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder()
        self.problem: str | None = None

    def notice(self) -> str | None:
        """One line for the user where the folder cannot be used."""
        if self.problem is None:
            return None
        return (
            f"the cache folder {self.folder} cannot be used ({self.problem}): the data are read from the start every "
            "time; name another one in VLMPO_CACHE"
        )

    def arrays(
        self,
        kind: str,
        stamp: Stamp | None,
        settings: Sequence[Any],
        make: Callable[[], Arrays],
        waiting: Callable[[], None] | None = None,
    ) -> Arrays:
        """The arrays made from some files under some settings: from the cache, else from ``make`` and then kept.

        Of several processes that ask for the same, one makes them and the others wait for it.

        Args:
            kind: what the arrays are.
            stamp: the files; None: nothing is kept.
            settings: JSON values, all else that decides the result.
            make: makes them, each of one dimension.
            waiting: called once where another process makes something from these files just now.
        """
        if stamp is None:
            return make()
        path, key = self._place(kind, stamp, settings)
        if (found := _read(path, key)) is not None:
            return found
        with self._lock(f"{kind}-{_hex(*stamp.paths)}.lock", waiting):
            if (found := _read(path, key)) is not None:  # made while this process waited
                return found
            made = make()
            if self.problem is not None or not stamp.holds() or not self._write(path, key, made):
                return made
        found = _read(path, key)
        return made if found is None else found

    def find(self, kind: str, stamp: Stamp | None, settings: Sequence[Any]) -> Arrays | None:
        """What :meth:`keep` left; None where there is nothing. For what no single process makes by itself."""
        return None if stamp is None else _read(*self._place(kind, stamp, settings))

    def keep(self, kind: str, stamp: Stamp | None, settings: Sequence[Any], made: Arrays) -> None:
        """Keep arrays made from some files under some settings, unless the files have changed."""
        if stamp is not None and stamp.holds():
            self._write(*self._place(kind, stamp, settings), made)

    def _place(self, kind: str, stamp: Stamp, settings: Sequence[Any]) -> tuple[Path, str]:
        """The file, and the key that it must hold."""
        key = json.dumps([kind, rules(), stamp.paths, stamp.state, *settings])
        return self.folder / f"{kind}-{_hex(*stamp.paths)}-{_hex(rules(), stamp.state)}-{_hex(key)}.bin", key

    @contextlib.contextmanager
    def _lock(self, name: str, waiting: Callable[[], None] | None) -> Iterator[None]:
        """Held by one process at a time, and let go by the system where that one dies; none where there are no locks.

        Without a lock several processes may make the same thing, each whole.
        """
        try:
            import fcntl

            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / name, "ab")  # noqa: SIM115  closed below, which lets go
        except (OSError, ImportError) as error:
            if isinstance(error, OSError):
                self.problem = self.problem or str(error)
            yield
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks
            yield

    def _write(self, path: Path, key: str, arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Whether the entry is there now. Entries of the same files in an earlier state go."""
        partial = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(suffix=".partial", prefix=f"{path.stem}-", dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                _write_entry(file, key, arrays)
            os.replace(partial, path)
        except OSError as error:
            self.problem = str(error)
            if partial is not None:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
            return False
        where, state, _ = path.stem.rsplit("-", 2)
        for other in self.folder.glob(f"{where}-*"):
            with contextlib.suppress(OSError):
                is_left = other.suffix == ".partial" and other.stat().st_mtime < time.time() - _DAY  # by a kill
                if is_left or not other.name.startswith(f"{where}-{state}-"):
                    other.unlink()
        return True


def _layout(arrays: Mapping[str, NDArray[Any]]) -> tuple[list[tuple[str, str, int, int]], int]:
    """(name, type, length, offset) of each array, offsets from the first one's; and bytes in all."""
    parts, end = [], 0
    for name, array in arrays.items():
        start = -(-end // _ALIGN) * _ALIGN
        parts.append((name, array.dtype.str, len(array), start))
        end = start + array.nbytes
    return parts, end


def _write_entry(file: Any, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    parts, _ = _layout(arrays)
    head = json.dumps({"key": key, "arrays": parts}).encode()
    digest = blake2b(digest_size=_DIGEST)
    file.write(bytes(_HEAD - 8))

    def put(data: Any) -> None:
        digest.update(data)
        file.write(data)

    put(len(head).to_bytes(8, "little"))
    put(head)
    put(bytes(-(_HEAD + len(head)) % _ALIGN))
    begin = file.tell()
    for (_, _, _, offset), array in zip(parts, arrays.values(), strict=True):
        put(bytes(begin + offset - file.tell()))
        put(np.ascontiguousarray(array).data.cast("B") if len(array) else b"")
    file.seek(0)
    file.write(_MAGIC + digest.digest())


def _read(path: Path, key: str) -> Arrays | None:
    """The arrays of an entry, mapped and not writable; None where it is absent, damaged or of another key."""
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    digest = content[len(_MAGIC) : len(_MAGIC) + _DIGEST]
    if content[: len(_MAGIC)] != _MAGIC or len(content) < _HEAD:
        return None
    with memoryview(content) as view, view[len(_MAGIC) + _DIGEST :] as covered:
        if blake2b(covered, digest_size=_DIGEST).digest() != digest:
            return None
    length = int.from_bytes(content[_HEAD - 8 : _HEAD], "little")
    head = json.loads(content[_HEAD : _HEAD + length])
    if head["key"] != key:
        return None
    begin = -(-(_HEAD + length) // _ALIGN) * _ALIGN
    return {
        name: np.frombuffer(content, np.dtype(kind), count, begin + offset)
        for name, kind, count, offset in head["arrays"]
    }
