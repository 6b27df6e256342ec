"""Where the records of a JSON array lie in its file, found without parsing it: in chunks, by whole arrays of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmpo.errors import DataError

Indices = NDArray[np.int64]

_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH, _COMMA, _NEWLINE = 34, 92, 44, 10


def _table(values: dict[bytes, int]) -> NDArray[np.int8]:
    """int8 [256]: a value for every byte, 0 for those not named."""
    table = np.zeros(256, np.int8)
    for characters, value in values.items():
        table[np.frombuffer(characters, np.uint8)] = value
    return table


_IS_MARK = _table({b"[{]},": 1}).astype(np.bool_)
_IS_SPACE = _table({b" \t\r\n": 1}).astype(np.bool_)
_STEP = _table({b"[{": 1, b"]}": -1})


class _Scan(NamedTuple):
    """What is carried from one chunk to the next."""

    depth: int = 0  # of brackets and braces around the next byte
    in_string: bool = False
    pending: bool = False  # a record begins with the next byte that is no space
    line: int = 1  # of the next byte
    done: bool = False  # the array is closed


def index_array(path: str) -> tuple[Indices, Indices, Indices]:
    """Byte offsets of start and end, and 1-based line, of every record of the array in ``path``, each int64 [records].

    Raises:
        DataError: brackets do not close, or something follows the array; the message names the line.
    """
    starts: list[Indices] = []
    ends: list[Indices] = []
    lines: list[Indices] = []
    scan = _Scan()
    for offset, chunk in _chunks(path):
        begun, ended, at_lines, scan = _scan_chunk(np.frombuffer(chunk, np.uint8), scan, path)
        starts.append(begun + offset)
        ends.append(ended + offset)
        lines.append(at_lines)
    begins, stops, numbers = (np.concatenate([np.empty(0, np.int64), *part]) for part in (starts, ends, lines))
    if scan.depth or scan.in_string:
        last = f"; its last record begins in line {numbers[-1]}" if len(numbers) else ""
        raise DataError(f"{path}: a JSON array that is not closed{last}: a bracket, brace or quote is missing there")
    if len(begins) == 1 and begins[0] == stops[0]:  # []
        begins, stops, numbers = begins[:0], stops[:0], numbers[:0]
    return begins, stops, numbers


def _chunks(path: str) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each chunk; none ends in a backslash, whose next byte decides what it means."""
    with open(path, "rb") as file:
        offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(offset)
        while chunk := file.read(_CHUNK):
            while chunk.endswith(b"\\") and (more := file.read(1)):
                chunk += more
            yield offset, chunk
            offset += len(chunk)


def _scan_chunk(data: NDArray[np.uint8], scan: _Scan, path: str) -> tuple[Indices, Indices, Indices, _Scan]:
    """Starts, ends and lines of the records that begin or end in a chunk, by offset in it; and what is carried on."""
    quotes = _real_quotes(data)
    marks = np.flatnonzero(_IS_MARK[data])
    marks = marks[(np.searchsorted(quotes, marks) + scan.in_string) % 2 == 0]
    steps = _STEP[data[marks]]
    depths = scan.depth + np.cumsum(steps, dtype=np.int64)  # after each mark
    newlines = np.flatnonzero(data == _NEWLINE)

    closed = np.concatenate([np.full(int(scan.done), -1), marks[(depths == 0) & (steps < 0)]])
    behind = _next_solid(data, closed[:1] + 1)
    if len(behind) and behind[0] < len(data):
        line = scan.line + int(np.searchsorted(newlines, behind[0]))
        raise DataError(f"{path}:{line}: the JSON array ends before this; a bracket or brace is missing or too many")

    separates = (depths == 1) & (steps == 0)
    before = marks[separates | ((depths == 1) & (steps > 0))] + 1
    begun = _next_solid(data, np.concatenate([np.zeros(int(scan.pending), np.int64), before]))
    pending = bool(len(begun)) and begun[-1] == len(data)
    begun = begun[:-1] if pending else begun
    ended = marks[separates | ((depths == 0) & (steps < 0))]
    depth = int(depths[-1]) if len(depths) else scan.depth
    in_string = bool((len(quotes) + scan.in_string) % 2)
    numbers = scan.line + np.searchsorted(newlines, begun)
    return begun, ended, numbers, _Scan(depth, in_string, pending, scan.line + len(newlines), bool(len(closed)))


def _next_solid(data: NDArray[np.uint8], at: Indices) -> Indices:
    """The first offset from each of ``at`` on that is no space; the length of ``data`` where there is none."""
    found = at.copy()
    left = np.arange(len(at))
    while len(left := left[found[left] < len(data)]) and len(left := left[_IS_SPACE[data[found[left]]]]):
        found[left] += 1
    return found


def _real_quotes(data: NDArray[np.uint8]) -> Indices:
    """Offsets of the quotes that begin or end a string: those after an even number of backslashes."""
    quotes = np.flatnonzero(data == _QUOTE)
    escaped = np.zeros(len(quotes), np.bool_)
    at, behind = np.arange(len(quotes)), quotes - 1  # the byte looked at before each quote still in question
    while len(at):
        is_backslash = (behind >= 0) & (data[np.maximum(behind, 0)] == _BACKSLASH)
        at, behind = at[is_backslash], behind[is_backslash] - 1
        escaped[at] ^= True
    return quotes[~escaped]
