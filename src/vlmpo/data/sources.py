"""Files of preference pairs, read where they lie: MMPR meta.json and JSON Lines into a memory-mapped data set.

Of a file only the byte offset and the number of each line are held, as two int64 arrays; a record is parsed when it is
asked for. So three million pairs cost some 70 MB, and nothing in DataLoader workers beyond that.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.fields import image_names, json_object, place_images, text_field
from vlmpo.data.records import Message, PreferencePair
from vlmpo.data.specs import FileSpec, SourceSpec, file_specs
from vlmpo.errors import DataError, RecordError

Indices = NDArray[np.int64]

_RECORD_KEYS = frozenset({"image", "video", "question", "chosen", "rejected"})
_CHUNK = 8 << 20
_BOM = b"\xef\xbb\xbf"
_NEWLINE = 10
_WHITESPACE = np.frombuffer(b" \t\r\n\v\f", np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# One file


class _PairFile:
    """One JSONL file: where its records begin, and their bytes through a memory map opened on first use."""

    def __init__(self, spec: FileSpec, name: str) -> None:
        self.name = name
        self.path = spec.path
        self.image_root = spec.image_root
        self.max_tiles = spec.max_tiles
        try:
            self.starts, self.lines = _index_lines(spec.path)  # int64 [records]: byte offset; line number, from 1
            self._size = os.path.getsize(spec.path)
        except OSError as error:
            raise DataError(f"{spec.path}: cannot be read ({error})") from error
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a map cannot be pickled: the other process opens its own

    def origin(self, record: int) -> str:
        return f"{self.path}:{self.lines[record]}"

    def read(self, record: int) -> bytes:
        """The bytes of one line, without its newline."""
        content = self._map or self._open()
        start = int(self.starts[record])
        end = content.find(b"\n", start)
        return content[start : end if end >= 0 else len(content)]

    def _open(self) -> mmap.mmap:
        try:
            with open(self.path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: could be read before, not any more ({error})") from error
        if len(content) != self._size:
            raise DataError(f"{self.path}: {self._size} bytes when opened, {len(content)} now; start again")
        self._map = content
        return content


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


class PairDataset:
    """Preference pairs of one or several files, by index; a pair is read and checked when it is asked for.

    Made by :func:`open_pairs`. Picklable; each process maps the files for itself.

    Attributes:
        notices: what the user should know about the sources though nothing is wrong with them, e.g. keys of no effect.
        need_rejected: whether pairs are for preference training. If not, ``rejected`` is not looked at and None.
        source_names: names of the sources, in the order they were named.
    """

    def __init__(self, files: Sequence[_PairFile], rows: Indices, need_rejected: bool, notices: list[str]) -> None:
        self._files = list(files)
        self._bounds = np.cumsum([0, *(len(file) for file in files)])  # [files + 1]: records before each file
        self._rows = rows  # [pairs]: record numbers, counted through all files
        self.need_rejected = need_rejected
        self.notices = notices
        self.source_names = [file.name for file in files]

    @property
    def paths(self) -> list[str]:
        """The annotation files behind the pairs, each once."""
        return list(dict.fromkeys(file.path for file in self._files))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PreferencePair:
        """Pair ``index``; its ``images`` are absolute paths, whose existence is not looked at here.

        Raises:
            RecordError: ``bad_json``, ``missing_field``, ``video_unsupported``, ``placeholder_mismatch``,
                ``empty_response`` or ``identical``.
        """
        file, record = self._locate(index)
        return _parse(file.read(record), file, file.origin(record), self.need_rejected)

    def origin(self, index: int) -> str:
        """``file:line`` of pair ``index``, without reading it."""
        file, record = self._locate(index)
        return file.origin(record)

    def source(self, index: int) -> str:
        """Name of the source of pair ``index``, without reading it."""
        return self._locate(index)[0].name

    def select(self, indices: NDArray[Any] | Sequence[int]) -> PairDataset:
        """A view that holds the pairs at ``indices``, in that order."""
        return self._view(self._rows[np.asarray(indices, np.int64)], self.need_rejected)

    def for_training(self, need_rejected: bool) -> PairDataset:
        """The same pairs, for preference training or for supervised fine-tuning."""
        return self._view(self._rows, need_rejected)

    def _view(self, rows: Indices, need_rejected: bool) -> PairDataset:
        return PairDataset(self._files, rows, need_rejected, self.notices)

    def _locate(self, index: int) -> tuple[_PairFile, int]:
        row = int(self._rows[index])  # IndexError past the end, as sequences have it
        position = int(np.searchsorted(self._bounds, row, side="right")) - 1
        return self._files[position], row - int(self._bounds[position])

    def common_root(self) -> str:
        """The deepest folder above all image roots."""
        return os.path.commonpath([os.path.normpath(file.image_root) for file in self._files])


def open_pairs(specs: Sequence[SourceSpec], *, seed: int = 0, need_rejected: bool = True) -> PairDataset:
    """Opens the files named by ``specs``. Reads each once for its line offsets; parses no record.

    Args:
        specs: the sources, in order; a repeated source's pairs follow each other, repeat after repeat.
        seed: decides which pairs make up the fraction of a ``repeat`` that is not whole; the draw of one source does
            not depend on the others.
        need_rejected: False for supervised fine-tuning, where ``rejected`` may be absent or anything.

    Raises:
        DataError: a file or folder that does not exist (every path tried is named), a malformed meta.json, a bad
            setting, or no pair at all.
    """
    notices: list[str] = []
    files: list[_PairFile] = []
    rows: list[Indices] = [np.empty(0, np.int64)]
    records_before = 0
    for spec in itertools.chain.from_iterable(file_specs(named, notices) for named in specs):
        file = _PairFile(spec, _free_name(spec.name, {file.name for file in files}))
        if spec.declared_length is not None and spec.declared_length != len(file):
            notices.append(f"{file.name}: meta.json says length {spec.declared_length}, {file.path} has {len(file)}")
        drawn = _repeated(len(file), spec.repeat, f"{seed}:{file.name}")
        if not len(drawn):
            notices.append(f"{file.name}: adds no pair ({len(file)} records in {file.path}, repeat {spec.repeat:g})")
        files.append(file)
        rows.append(drawn + records_before)
        records_before += len(file)
    dataset = PairDataset(files, np.concatenate(rows), need_rejected, notices)
    if not len(dataset):
        raise DataError(f"no pair in {', '.join(named.path for named in specs) or 'the data: no source is named'}")
    return dataset


def _free_name(name: str, taken: set[str]) -> str:
    """``name``, or ``name-2``, ``name-3``, ...: counts and metrics of two sources must not run together."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def _repeated(records: int, repeat: float, seed: str) -> Indices:
    """Record numbers for ``repeat`` passes: whole ones, then a seeded subset, in file order, for the fraction."""
    total = round(records * repeat)
    whole, rest = divmod(total, records) if records else (0, 0)
    generator = np.random.default_rng(stable_hash(seed))
    subset = np.sort(generator.choice(records, rest, replace=False)) if rest else np.empty(0, np.int64)
    return np.concatenate([np.tile(np.arange(records, dtype=np.int64), whole), subset])


# ---------------------------------------------------------------------------------------------------------------------
# One record


def _parse(raw: bytes, file: _PairFile, origin: str, need_rejected: bool) -> PreferencePair:
    record = json_object(raw, origin)
    if record.get("video"):
        raise RecordError("video_unsupported", origin, "`video` is not supported yet; take the record out")
    names = image_names(record, origin)
    question = text_field(record, "question", origin)
    if not names and not question.strip():
        raise RecordError("missing_field", origin, "`question` is empty and there is no image: nothing to answer")
    chosen = text_field(record, "chosen", origin)
    rejected = text_field(record, "rejected", origin) if need_rejected else None
    pair = PreferencePair(
        prompt=(Message("user", place_images(question, len(names), origin)),),
        images=tuple(os.path.join(file.image_root, name) for name in names),
        chosen=chosen,
        rejected=rejected,
        source=file.name,
        origin=origin,
        max_tiles=file.max_tiles,
        metadata={key: value for key, value in record.items() if key not in _RECORD_KEYS},
    )
    _check_responses(pair, need_rejected)
    return pair


def _check_responses(pair: PreferencePair, need_rejected: bool) -> None:
    if not pair.chosen.strip():
        raise RecordError("empty_response", pair.origin, "`chosen` is empty: there is nothing to score")
    if not need_rejected:
        return
    if not (pair.rejected or "").strip():
        raise RecordError("empty_response", pair.origin, "`rejected` is empty: there is nothing to score")
    if pair.chosen == pair.rejected:
        raise RecordError("identical", pair.origin, "`chosen` and `rejected` are the same: no preference to learn")


def stable_hash(text: str) -> int:
    """64 bits that depend on the text alone: Python's own hash() differs from one process to the next."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
