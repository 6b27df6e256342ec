"""Keep the reference's log-probs on disk: a response is scored once, whatever run, epoch or rank needs it next.

An entry is 32 bytes: the key of the response's content, its summed log-prob, the number of its scored tokens, and a
checksum. Every process appends to a shard of its own, so it cannot damage what another one wrote. A process may be
killed at any byte and loses no acknowledged entry; a torn or damaged one fails its checksum, is left out, and its
log-prob is computed again.
"""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmpo.errors import RunError

MAGIC = b"vlmpo reference log-probs, v1\n".ljust(32, b"\0")  # as long as an entry, so that entries are aligned
ENTRY = np.dtype([("key", "S16"), ("logp", "<f8"), ("tokens", "<u4"), ("check", "<u4")])
assert ENTRY.itemsize == len(MAGIC) == 32


class Scored(NamedTuple):
    """Holds the log-prob of one response, summed over its scored tokens, and the number of these."""

    logp: float
    tokens: int


class ReferenceStore:
    """Stores log-probs of responses by content key, in the shards of one folder.

    It holds what all processes had written when it was opened or last refreshed, and what it has written since.

    Args:
        folder: folder of the shards, made if it does not exist; runs and ranks may share it.

    Attributes:
        damaged: entries that were left out at the last refresh because their checksum was wrong.

    Raises:
        RunError: the folder cannot be made, or holds a shard of another format.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.damaged = 0
        self._written: dict[bytes, Scored] = {}
        self._file: int | None = None
        self._path = self._new_path()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"reference.cache_dir: {self.folder} cannot be made ({error}); set another folder"
            ) from error
        self.refresh()

    def _new_path(self) -> Path:
        return self.folder / f"shard-{uuid.uuid4().hex}.bin"

    def refresh(self) -> None:
        """Read what all processes have written by now."""
        self.damaged = 0
        shards = [self._read(path) for path in sorted(self.folder.glob("shard-*.bin")) if path != self._path]
        entries = np.concatenate([np.empty(0, ENTRY), *shards])
        order = np.argsort(entries["key"], kind="stable")
        # Arrays of their own: a search in a field of a structured array would copy the field every time.
        self._keys, self._logps, self._tokens = (entries[name][order] for name in ("key", "logp", "tokens"))

    def _read(self, path: Path) -> NDArray[np.void]:
        """Return the sound entries of one shard, which another process may be writing."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RunError(f"reference.cache_dir: {path} cannot be read ({error}); set another folder") from error
        if len(content) < len(MAGIC):
            return np.empty(0, ENTRY)  # killed before it wrote anything
        if content[: len(MAGIC)] != MAGIC:
            raise RunError(
                f"reference.cache_dir: {path} is no shard of this version; move it away or set another folder"
            )
        entries = np.frombuffer(content, ENTRY, (len(content) - len(MAGIC)) // ENTRY.itemsize, offset=len(MAGIC))
        sound = checksums(entries) == entries["check"]
        self.damaged += int(len(entries) - sound.sum())
        return entries[sound]

    def __len__(self) -> int:
        return len(np.union1d(self._keys, np.array(list(self._written), "S16")))

    def get(self, key: bytes) -> Scored | None:
        """Return the score of the response with this content, None if there is none."""
        if key in self._written:
            return self._written[key]
        at = int(self._keys.searchsorted(key))
        # NumPy drops zero bytes at the end of an item; tobytes() does not.
        if self._keys[at : at + 1].tobytes() != key:
            return None
        return Scored(float(self._logps[at]), int(self._tokens[at]))

    def put(self, keys: Sequence[bytes], scored: Iterable[Scored]) -> None:
        """Write the scores of some responses; once this returns, they survive the end of the process.

        Raises:
            RunError: they cannot be written.
        """
        scores = dict(zip(keys, scored, strict=True))
        entries = np.zeros(len(scores), ENTRY)
        entries["key"] = list(scores)
        entries["logp"] = [score.logp for score in scores.values()]
        entries["tokens"] = [score.tokens for score in scores.values()]
        entries["check"] = checksums(entries)
        content = memoryview(entries.tobytes())
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
                content = memoryview(MAGIC + content)
            while content:
                content = content[os.write(self._file, content) :]
        except OSError as error:
            path = self._path
            if self._file is not None:  # its last entry may be torn: nothing may follow it
                os.close(self._file)
            self._file, self._path = None, self._new_path()
            raise RunError(f"reference.cache_dir: {path} cannot be written ({error})") from error
        self._written |= scores

    def sync(self) -> None:
        """Make the written scores survive a crash of the machine as well.

        Raises:
            RunError: they cannot be written.
        """
        try:
            if self._file is not None:
                os.fsync(self._file)
        except OSError as error:
            raise RunError(f"reference.cache_dir: {self._path} cannot be written ({error})") from error


def checksums(entries: NDArray[np.void]) -> NDArray[np.uint32]:
    """Return the CRC-32 of each entry's bytes before its checksum: a single damaged byte always changes it."""
    content, size = memoryview(entries.tobytes()), ENTRY.itemsize
    crcs = (zlib.crc32(content[start : start + size - 4]) for start in range(0, len(content), size))
    return np.fromiter(crcs, np.uint32, len(entries))
