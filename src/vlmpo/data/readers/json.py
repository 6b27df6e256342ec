"""Read records in JSON files: JSON Lines, and arrays of objects. Each is parsed when it is read.

Only the place of each record is held: where it starts and ends, and its line, 20 bytes. So three million lines cost
60 MB. For a large file they are in the cache, and all processes map the same ones.
"""

from __future__ import annotations

import functools
import json
import os
import re
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlmpo.data.index.columns import to_arrow, to_numpy
from vlmpo.data.index.store import Cache, Stamp
from vlmpo.data.records import BOM, json_kind
from vlmpo.errors import DataError, FileChangedError, RecordError

# An array is read whole to find its records, once if the cache can be written to.
MAX_ARRAY_BYTES = 2 << 30

_CHUNK = 8 << 20
_NEWLINE = 10
_WHITESPACE = np.frombuffer(b" \t\r\n\v\f", np.uint8)
_skip_spaces = re.compile(r"[ \t\r\n]*").match


class JsonRecords:
    """Reads the records of one JSON file, opened on first use. Picklable; each process opens the file for itself.

    Args:
        path: the file.
        is_array: True if it is one array of objects, False for JSON Lines.
        cache: where the places of the records may be kept; None finds them anew.

    Attributes:
        kind: what users call such a file.
        stamp: state of the file when it was opened; None if nothing is kept of it.

    Raises:
        DataError: the file cannot be read, or is not a whole array.
    """

    def __init__(self, path: str, is_array: bool = False, cache: Cache | None = None) -> None:
        self.path = path
        self.kind = "JSON array" if is_array else "JSON Lines"
        self._is_array = is_array
        self._cache = cache
        self._file: FileIO | None = None
        self.stamp = None if cache is None else Stamp.of([path])
        try:
            status = os.stat(path)
            self._size, self._written = status.st_size, status.st_mtime_ns
            self._load_places()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error

    def _load_places(self) -> None:
        kind, find = ("array", find_elements) if self._is_array else ("lines", find_lines)
        make = functools.partial(find, self.path)
        places = make() if self._cache is None else self._cache.table(kind, self.stamp, [], make)
        self._starts, self._ends, self._lines = (to_numpy(places[name]) for name in ("start", "end", "line"))

    def __len__(self) -> int:
        return len(self._starts)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_file": None}
        if self.stamp is not None:
            for name in ("_starts", "_ends", "_lines"):
                del state[name]  # the other process maps the cache's
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self.stamp is not None:
            self._load_places()

    @property
    def paths(self) -> list[str]:
        """List the file."""
        return [self.path]

    def origin(self, index: int) -> str:
        """Return ``file:line`` of record ``index``."""
        return f"{self.path}:{self._lines[index]}"

    def record(self, index: int) -> dict[str, Any]:
        """Read record ``index``.

        Raises:
            RecordError: ``bad_json``.
            FileChangedError: the file has changed since it was opened.
        """
        file = self._file or self._open()
        status = os.fstat(file.fileno())
        if status.st_size != self._size:
            raise FileChangedError(f"{self.path}: {self._size} bytes when opened, {status.st_size} now; start again")
        start = int(self._starts[index])
        content = os.pread(file.fileno(), int(self._ends[index]) - start, start)
        unit, remedy = ("record", "write a JSON object") if self._is_array else ("line", "write one JSON object a line")
        try:
            record = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if status.st_mtime_ns != self._written:
                raise FileChangedError(f"{self.path}: written to since it was opened; start again") from error
            detail = f"the {unit} is not valid JSON in UTF-8 ({error}); {remedy}"
            raise RecordError("bad_json", self.origin(index), detail) from error
        if not isinstance(record, dict):
            raise RecordError("bad_json", self.origin(index), f"the {unit} holds {json_kind(record)}; {remedy}")
        return record

    def _open(self) -> FileIO:
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115  closed with this object
        except OSError as error:
            raise FileChangedError(f"{self.path}: could be read before, not any more ({error})") from error
        self._file = file
        return file


def find_lines(path: str) -> pa.Table:
    """Find every line that is not blank: ``start`` and ``end`` in bytes, and ``line``, its number from 1.

    A UTF-8 byte order mark is skipped.
    """
    parts = [_places([], [], [])]
    with open(path, "rb") as file:
        offset = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(offset)
        line = 1
        while chunk := file.read(_CHUNK):
            chunk += file.readline()  # so that every chunk holds whole lines
            starts, ends = _chunk_lines(chunk)
            begins_blank = np.flatnonzero(np.isin(np.frombuffer(chunk, np.uint8)[starts], _WHITESPACE)).tolist()
            blank = [index for index in begins_blank if not chunk[starts[index] : ends[index]].strip()]
            kept = np.delete(np.arange(len(starts)), blank)
            parts.append(_places(starts[kept] + offset, ends[kept] + offset, kept + line))
            offset += len(chunk)
            line += len(starts)
    return pa.concat_tables(parts).combine_chunks()


def _places(starts: Any, ends: Any, lines: Any) -> pa.Table:
    columns = {"start": (starts, np.int64), "end": (ends, np.int64), "line": (lines, np.uint32)}
    return pa.table({name: to_arrow(np.asarray(values, dtype)) for name, (values, dtype) in columns.items()})


def _chunk_lines(chunk: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each line in ``chunk`` starts and ends, its newline left out: int64 [lines] each."""
    newlines = np.flatnonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE)
    ends = newlines if chunk.endswith(b"\n") else np.append(newlines, len(chunk))
    return np.append(np.int64(0), newlines + 1)[: len(ends)], ends


def find_elements(path: str) -> pa.Table:
    """Find the elements of the JSON array in ``path``, with the columns of :func:`find_lines`.

    Raises:
        DataError: the array is larger than MAX_ARRAY_BYTES, or is not valid JSON; the message names the line.
    """
    size = os.path.getsize(path)
    if size > MAX_ARRAY_BYTES:
        raise DataError(
            f"{path}: a JSON array of {size / 1e9:.1f} GB, which would be read into memory whole (the limit is "
            f"{MAX_ARRAY_BYTES / 1e9:.1f} GB); write it as JSON Lines, one object a line, and name that file .jsonl"
        )
    # Latin-1 makes one character of each byte, so positions in the text are offsets in the file. Only they are used.
    text = Path(path).read_bytes().decode("latin-1")
    starts: list[int] = []
    ends: list[int] = []
    lines: list[int] = []
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    try:
        at = _end_of_spaces(text, text.index("[") + 1)
        while text[at : at + 1] != "]" or starts:
            line, counted = line + text.count("\n", counted, at), at
            starts.append(at)
            lines.append(line)
            at = decoder.raw_decode(text, at)[1]
            ends.append(at)
            at = _end_of_spaces(text, at)
            if text[at : at + 1] != ",":
                break
            at = _end_of_spaces(text, at + 1)
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        if (behind := _end_of_spaces(text, at + 1)) < len(text):
            raise json.JSONDecodeError("the array ends before this", text, behind)
    except (json.JSONDecodeError, RecursionError) as error:
        where, what = (error.lineno, error.msg) if isinstance(error, json.JSONDecodeError) else (line, str(error))
        begins = f"; the last record begins in line {lines[-1]}" if lines and lines[-1] != where else ""
        raise DataError(
            f"{path}:{where}: not a valid JSON array ({what}){begins}: look for a bracket, brace, quote or comma that "
            "is missing or too many"
        ) from None  # the error holds the whole text
    return _places(starts, ends, lines)


def _end_of_spaces(text: str, at: int) -> int:
    match = _skip_spaces(text, at)
    assert match is not None  # it may be empty
    return match.end()
