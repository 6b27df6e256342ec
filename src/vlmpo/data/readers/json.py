"""Records in JSON files: JSON Lines, and arrays of objects. Parsed one at a time.

Of a file only where each record begins (and, of an array, ends) and the number of its line are held, as int64 arrays.
So three million lines cost some 50 MB. Of a large file they lie in the cache, and all processes map the same ones.
"""

from __future__ import annotations

import os
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.fields import json_object
from vlmpo.data.index.store import Arrays, Cache, Stamp
from vlmpo.data.readers.jsonarray import index_array
from vlmpo.errors import DataError

Indices = NDArray[np.int64]

_CHUNK = 8 << 20
_BOM = b"\xef\xbb\xbf"
_NEWLINE = 10
_WHITESPACE = np.frombuffer(b" \t\r\n\v\f", np.uint8)


class JsonRecords:
    """The records of one JSON file: where they begin, and their bytes, from a file opened on first use.

    Args:
        path: the file.
        is_array: whether it is one array of objects; else JSON Lines.
        cache: where the index may lie; by default it is made now.

    Attributes:
        stamp: the file in the state in which it was opened.

    Raises:
        DataError: it cannot be read, or is no whole array.
    """

    def __init__(self, path: str, is_array: bool = False, cache: Cache | None = None) -> None:
        self.path = path
        self.kind = "JSON array" if is_array else "JSON Lines"
        self._is_array = is_array
        self._cache = cache
        self._file: FileIO | None = None
        self.stamp = None if cache is None else Stamp.of([path])
        try:
            self._size = os.path.getsize(path)
            self._load_index()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error

    def _load_index(self) -> None:
        """int64 [records] each: byte offset; of an array, where it ends; line number, from 1."""
        kind, make = ("array", self._array_index) if self._is_array else ("lines", self._line_index)
        index = make() if self._cache is None else self._cache.arrays(kind, self.stamp, [], make)
        self.starts, self.lines, self._ends = index["starts"], index["lines"], index.get("ends")

    def _line_index(self) -> Arrays:
        starts, lines = _index_lines(self.path)
        return {"starts": starts, "lines": lines}

    def _array_index(self) -> Arrays:
        starts, ends, lines = index_array(self.path)
        return {"starts": starts, "ends": ends, "lines": lines}

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_file": None}  # a file cannot be pickled: the other process opens its own
        if self.stamp is not None:
            for name in ("starts", "lines", "_ends"):
                del state[name]  # it maps the cache's
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self.stamp is not None:
            self._load_index()

    @property
    def paths(self) -> list[str]:
        """The files behind the records."""
        return [self.path]

    def origin(self, index: int) -> str:
        """``file:line`` of record ``index``."""
        return f"{self.path}:{self.lines[index]}"

    def record(self, index: int) -> dict[str, Any]:
        """Record ``index``. Raises RecordError ``bad_json``."""
        return json_object(self._read(index), self.origin(index), "line" if self._ends is None else "record")

    def _read(self, index: int) -> bytes:
        file = self._file or self._open()
        start = int(self.starts[index])
        if self._ends is not None:
            return os.pread(file.fileno(), int(self._ends[index]) - start, start)
        end = int(self.starts[index + 1]) if index + 1 < len(self.starts) else self._size
        return os.pread(file.fileno(), end - start, start).partition(b"\n")[0]  # blank lines may follow

    def _open(self) -> FileIO:
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115  closed with this object
            size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(f"{self.path}: could be read before, not any more ({error})") from error
        if size != self._size:
            raise DataError(f"{self.path}: {self._size} bytes when opened, {size} now; start again")
        self._file = file
        return file


def _index_lines(path: str) -> tuple[Indices, Indices]:
    """Byte offset and 1-based number of every line that is not blank; a UTF-8 byte order mark is stepped over."""
    starts: list[Indices] = [np.empty(0, np.int64)]
    numbers: list[Indices] = [np.empty(0, np.int64)]
    with open(path, "rb") as file:
        offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(offset)
        line = 1
        while chunk := file.read(_CHUNK):
            chunk += file.readline()  # so that every chunk holds whole lines
            begins, is_record = _chunk_lines(chunk)
            starts.append(begins[is_record] + offset)
            numbers.append(np.flatnonzero(is_record) + line)
            offset += len(chunk)
            line += len(begins)
    return np.concatenate(starts), np.concatenate(numbers)


def _chunk_lines(chunk: bytes) -> tuple[Indices, NDArray[np.bool_]]:
    """Offset of each line in ``chunk`` [lines], and whether it holds more than whitespace [lines]."""
    data = np.frombuffer(chunk, np.uint8)
    newlines = np.flatnonzero(data == _NEWLINE)
    begins = np.concatenate([np.zeros(1, np.int64), newlines + 1])
    if begins[-1] == len(chunk):
        begins = begins[:-1]
    is_record = np.ones(len(begins), np.bool_)
    for index in np.flatnonzero(np.isin(data[begins], _WHITESPACE)):
        end = newlines[index] if index < len(newlines) else len(chunk)
        is_record[index] = bool(chunk[begins[index] : end].strip())
    return begins, is_record


# ---------------------------------------------------------------------------------------------------------------------
# The data set
