"""Read records in JSON files: JSON Lines, and arrays of objects. Each is parsed when it is read.

Only the place of each record is held: where it starts and ends, and its line, 20 bytes. So three million lines cost
60 MB. For a large file they are in the cache, and all processes map the same ones.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections import Counter
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlmpo.data.index.columns import to_arrow, to_numpy
from vlmpo.data.index.store import Cache, Stamp
from vlmpo.data.records import BASE64_START, BOM, MAX_ENCODED_BYTES, MAX_LINE_BYTES, json_kind
from vlmpo.errors import DataError, FileChangedError, RecordError, shorten

# An array is read whole to find its records, once if the cache can be written to.
MAX_ARRAY_BYTES = 2 << 30

_CHUNK = 8 << 20
# A line may hold one image or video of the greatest size, in base64, and MAX_LINE_BYTES beside it.
_MAX_WHOLE_LINE = MAX_LINE_BYTES + MAX_ENCODED_BYTES * 4 // 3
_BLOCK = 64 << 10
_MEDIUM_START = re.compile(rb'"(data:(image|video)|' + BASE64_START.replace("/", r"\\?/").encode() + rb")")
_BASE64_BYTES = bytes(range(ord("a"), ord("z") + 1)) + bytes(range(ord("A"), ord("Z") + 1)) + b"0123456789+/-_=\\"
_NEWLINE = 10
_WHITESPACE = np.frombuffer(b" \t\r\n\v\f", np.uint8)
_skip_spaces = re.compile(r"[ \t\r\n]*").match


class RepeatedKeyError(ValueError):
    """An object in JSON has a key twice, of which Python would keep the last."""


class WrittenNumber:
    """Holds a number of a JSON text as it is written there: ``1e3``, ``0.50``."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:  # and so str()
        return self.text


def _no_key_twice(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(items)
    if len(record) != len(items):
        key = next(key for key, count in Counter(key for key, _ in items).items() if count > 1)
        raise RepeatedKeyError(f"the key {shorten(repr(key))} is given twice; leave the one that is meant")
    return record


# Made once: json.loads makes a decoder a call for such settings. The check takes 1.05 to 1.4 times as long as none.
decode_json = json.JSONDecoder(object_pairs_hook=_no_key_twice).decode
decode_json_as_written = json.JSONDecoder(
    object_pairs_hook=_no_key_twice, parse_int=WrittenNumber, parse_float=WrittenNumber, parse_constant=WrittenNumber
).decode


class JsonRecords:
    """Reads the records of one JSON file, opened on first use. Picklable; each process opens the file for itself.

    Args:
        path: the file.
        is_array: True if it is one array of objects, False for JSON Lines.
        cache: where the places of the records may be kept; None finds them anew.
        numbers_as_written: return each number as a WrittenNumber.

    Attributes:
        kind: what users call such a file.
        stamp: state of the file when it was opened; None if nothing is kept of it.

    Raises:
        DataError: the file cannot be read, or is not a whole array.
    """

    def __init__(
        self, path: str, is_array: bool = False, cache: Cache | None = None, numbers_as_written: bool = False
    ) -> None:
        self.path = path
        self._numbers_as_written = numbers_as_written
        self.kind = "JSON array" if is_array else "JSON Lines"
        self._is_array = is_array
        self._cache = cache
        self._file: FileIO | None = None
        self.stamp = None if cache is None else Stamp.of([path])
        try:
            with open(path, "rb") as content:
                refuse_other_encodings(path, content.read(8))
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

    def with_numbers_as_written(self) -> JsonRecords:
        """Return a reader of the same file that returns each number as a WrittenNumber."""
        other = copy.copy(self)
        other._numbers_as_written = True
        return other

    def record(self, index: int) -> dict[str, Any]:
        """Read record ``index``.

        Raises:
            RecordError: ``bad_json``, ``ambiguous_field`` for a key given twice, or ``too_large``.
            FileChangedError: the file has changed since it was opened.
        """
        file = self._file or self._open()
        status = os.fstat(file.fileno())
        if status.st_size != self._size:
            raise FileChangedError(f"{self.path}: {self._size} bytes when opened, {status.st_size} now; start again")
        start = int(self._starts[index])
        size = int(self._ends[index]) - start
        unit, remedy = ("record", "write a JSON object") if self._is_array else ("line", "write one JSON object a line")
        content = os.pread(file.fileno(), size, start) if size <= _MAX_WHOLE_LINE else b""
        if size > MAX_LINE_BYTES and size - _media_bytes(content) > MAX_LINE_BYTES:
            detail = (
                f"the {unit} takes {size / 1e6:.1f} MB, at most {MAX_LINE_BYTES >> 20} MiB are read, beside one "
                f"embedded image or video of {MAX_ENCODED_BYTES >> 20} MiB; shorten it, or save what it embeds as files"
            )
            raise RecordError("too_large", self.origin(index), detail)
        decode = decode_json_as_written if self._numbers_as_written else decode_json
        try:
            record = decode(content.decode("utf-8"))
        except RepeatedKeyError as error:
            raise RecordError("ambiguous_field", self.origin(index), str(error)) from error
        except (ValueError, RecursionError) as error:
            if status.st_mtime_ns != self._written:
                raise FileChangedError(f"{self.path}: written to since it was opened; start again") from error
            if not self._is_array and _is_part_of_an_object(content, error):
                remedy = _SEVERAL_LINES
            detail = f"the {unit} is not valid JSON in UTF-8 ({shorten(error)}); {remedy}"
            raise RecordError("bad_json", self.origin(index), detail) from error
        if not isinstance(record, dict):
            if not self._is_array:
                is_list = isinstance(record, list)
                remedy = f"{remedy}, or name a file that holds one array .json" if is_list else _SEVERAL_LINES
            raise RecordError("bad_json", self.origin(index), f"the {unit} holds {json_kind(record)}; {remedy}")
        return record

    def _open(self) -> FileIO:
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115  closed with this object
        except OSError as error:
            raise FileChangedError(f"{self.path}: could be read before, not any more ({error})") from error
        self._file = file
        return file


def _media_bytes(content: bytes) -> int:
    """Return how many bytes of a line are in images and videos written as base64, as far as they fill whole blocks."""
    total, counts, quote = 0, False, 0
    for start in range(0, len(content), _BLOCK):
        block = content[start : start + _BLOCK]
        if block.translate(None, _BASE64_BYTES):
            counts = False
            quote = start + block.rfind(b'"')  # of the text that reaches into the next block
        elif counts or _MEDIUM_START.match(content, quote):
            counts = True
            total += len(block)
    return total


_PART_OF_AN_OBJECT = re.compile(rb'\s*(?:[\]}]+,?\s*$|"(?:[^"\\]|\\.)*"\s*(?::|,?\s*$))')


_SEVERAL_LINES = "an object written over several lines? write one JSON object a line, or an array in a file named .json"


def _is_part_of_an_object(line: bytes, error: Exception) -> bool:
    """Return whether a line that is no JSON may be one of several that an object is written on."""
    ends_early = isinstance(error, json.JSONDecodeError) and not error.doc[error.pos :].strip()
    return (ends_early and line.lstrip()[:1] in (b"{", b"[")) or _PART_OF_AN_OBJECT.match(line) is not None


# What a file begins with that is no UTF-8: byte order marks, and the zero bytes of the first character without one.
_ENCODINGS = (
    (b"\xff\xfe\0\0|\0\0\xfe\xff|\0\0\0[^\0]|[^\0]\0\0\0", "UTF-32"),
    (b"\xff\xfe|\xfe\xff|\0[^\0]|[^\0]\0", "UTF-16"),
)
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
}


def refuse_other_encodings(path: str, start: bytes) -> None:
    """Raise DataError if a file that should hold JSON in UTF-8 begins with ``start`` and so holds something else."""
    for pattern, name in _ENCODINGS:
        if re.match(pattern, start, re.DOTALL):
            remedy = f"save it as UTF-8, e.g. iconv -f {name} -t UTF-8"
            raise DataError(f"{path}:1: the file is written in {name}, and JSON is read in UTF-8; {remedy}")
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            raise DataError(f"{path}: the file is packed with {name}; unpack it and name what is in it")
    if start.startswith(b"PAR1"):
        raise DataError(f"{path}: the file is Parquet; name it .parquet")


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
            chunk += file.readline(_MAX_WHOLE_LINE)  # so that every chunk holds whole lines
            starts, ends = _chunk_lines(chunk)
            skipped = 0 if chunk.endswith(b"\n") else _skip_line(file)
            begins_blank = np.flatnonzero(np.isin(np.frombuffer(chunk, np.uint8)[starts], _WHITESPACE)).tolist()
            blank = [index for index in begins_blank if not chunk[starts[index] : ends[index]].strip()]
            if skipped and blank[-1:] == [len(ends) - 1]:  # who knows what follows so many spaces
                blank.pop()
            ends[-1] += skipped
            kept = np.delete(np.arange(len(starts)), blank)
            parts.append(_places(starts[kept] + offset, ends[kept] + offset, kept + line))
            offset += len(chunk) + skipped
            line += len(starts)
    return pa.concat_tables(parts).combine_chunks()


def _skip_line(file: BufferedReader) -> int:
    """Skip the rest of a line that is too long to be read, and return its bytes; 0 at the end of the file."""
    skipped = 0
    while rest := file.readline(_CHUNK):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


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
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)  # a number that is none is its record's own fault
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
