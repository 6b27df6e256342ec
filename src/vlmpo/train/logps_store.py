"""The reference's log-probs on disk: each response is scored once, whatever run, epoch or rank asks for it next.

An entry is 32 bytes: the key of the response's content, its summed log-prob, the number of its scored tokens, and a
checksum. Every process appends to a shard of its own, so nothing that another one writes or leaves half-written can
damage it: after a kill at any byte what was acknowledged is there, and a torn or damaged entry is seen by its checksum,
left out and computed again.
"""

from __future__ import annotations

import hashlib
import os
import uuid
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmpo.errors import RunError

KEY_BYTES = 16
MAGIC = b"vlmpo reference log-probs, v1\n".ljust(32, b"\0")  # as long as an entry, so that entries are aligned
ENTRY = np.dtype([("key", np.void, KEY_BYTES), ("logp", "<f8"), ("tokens", "<u4"), ("check", "<u4")])
assert ENTRY.itemsize == len(MAGIC) == 32
# CRC-32's table, read off zlib: what a single byte's checksum is without its start and end values.
_CRC_TABLE = np.array([zlib.crc32(bytes([value ^ 0xFF])) ^ 0xFF000000 for value in range(256)], np.uint32)


class Scored(NamedTuple):
    """What the reference says of one response: log-probability summed over its scored tokens, and how many these
    are."""

    logp: float
    tokens: int


def content_key(*parts: bytes | memoryview) -> bytes:
    """16 bytes that differ where any of ``parts`` differs, or where they are cut elsewhere."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


class ReferenceStore:
    """Log-probs of responses by content key, in the shards of one folder.

    Reads what all processes had written when it was opened (or :meth:`refresh`\\ ed) and what it wrote itself.

    Args:
        folder: made where it does not exist; may be shared by runs and ranks.

    Attributes:
        damaged: entries that were left out because their checksum did not fit, at the last reading.

    Raises:
        RunError: the folder cannot be made, or holds a shard of another format.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.damaged = 0
        self._mine: dict[bytes, Scored] = {}
        self._file: int | None = None
        self._path = self.folder / f"shard-{uuid.uuid4().hex}.bin"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"reference.cache_dir: {self.folder} cannot be made ({error}); name another") from error
        self.refresh()

    def refresh(self) -> None:
        """Read what all processes have written by now."""
        self.damaged = 0
        parts = [self._read(path) for path in sorted(self.folder.glob("shard-*.bin")) if path != self._path]
        entries = np.concatenate(parts) if parts else np.empty(0, ENTRY)
        heads = _heads(entries)
        order = np.argsort(heads, kind="stable")
        self._entries: NDArray[np.void] = entries[order]
        self._heads = heads[order]  # uint64 [entries], ascending: looked through by bisection

    def _read(self, path: Path) -> NDArray[np.void]:
        """The sound entries of one shard; another process may be writing it."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RunError(f"reference.cache_dir: {path} cannot be read ({error})") from error
        if len(content) < len(MAGIC):
            return np.empty(0, ENTRY)  # killed before it wrote anything
        if content[: len(MAGIC)] != MAGIC:
            raise RunError(f"reference.cache_dir: {path} is no shard of this version; move it away or name another")
        entries = np.frombuffer(content, ENTRY, (len(content) - len(MAGIC)) // ENTRY.itemsize, offset=len(MAGIC))
        sound = _checksums(entries) == entries["check"]
        self.damaged += int(len(entries) - sound.sum())
        return entries[sound]

    def __len__(self) -> int:
        return len({key.tobytes() for key in self._entries["key"]} | self._mine.keys())

    def get(self, key: bytes) -> Scored | None:
        """What is known of the response with this content; None where nothing is."""
        if key in self._mine:
            return self._mine[key]
        head = int.from_bytes(key[:8], "big")
        for at in range(*(int(np.searchsorted(self._heads, head, side)) for side in ("left", "right"))):
            entry = self._entries[at]
            if entry["key"].tobytes() == key:
                return Scored(float(entry["logp"]), int(entry["tokens"]))
        return None

    def put(self, keys: Sequence[bytes], scored: Iterable[Scored]) -> None:
        """Keep what the reference says of some responses. On return it survives the end of this process.

        Raises:
            RunError: the disk does not take it.
        """
        found = dict(zip(keys, scored, strict=True))
        entries = np.zeros(len(found), ENTRY)
        entries["key"] = np.frombuffer(b"".join(found), np.dtype((np.void, KEY_BYTES)))
        entries["logp"] = [value.logp for value in found.values()]
        entries["tokens"] = [value.tokens for value in found.values()]
        entries["check"] = _checksums(entries)
        try:
            self._append(entries.tobytes())
        except OSError as error:
            self._leave_shard()  # part of an entry may stand at its end: nothing may follow it
            raise RunError(f"reference.cache_dir: {self._path} cannot be written ({error})") from error
        self._mine |= found

    def _append(self, content: bytes) -> None:
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            content = MAGIC + content
        view = memoryview(content)
        while view:
            view = view[os.write(self._file, view) :]

    def _leave_shard(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None
        self._path = self.folder / f"shard-{uuid.uuid4().hex}.bin"

    def sync(self) -> None:
        """Have what was written survive the end of the machine as well.

        Raises:
            RunError: the disk did not take all of it.
        """
        if self._file is None:
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            raise RunError(f"reference.cache_dir: {self._path} cannot be written ({error})") from error


def _heads(entries: NDArray[np.void]) -> NDArray[np.uint64]:
    """The first half of each key as a number."""
    return entries["key"].copy().view(">u8").reshape(-1, KEY_BYTES // 8)[:, 0].astype(np.uint64)


def _checksums(entries: NDArray[np.void]) -> NDArray[np.uint32]:
    """CRC-32 of each entry's bytes before its checksum: one damaged byte always shows. As zlib's, for all at once."""
    data = np.ascontiguousarray(entries).view(np.uint8).reshape(-1, ENTRY.itemsize)[:, :-4]
    crc = np.full(len(entries), 0xFFFFFFFF, np.uint32)
    for column in data.T:
        crc = _CRC_TABLE[(crc ^ column) & 0xFF] ^ (crc >> np.uint32(8))
    return ~crc
