"""Hold the result of one pass over the records of a source: prompts by hash, images and videos by name, faults."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmpo.data.index.columns import binary_to_arrow, one_chunk, to_arrow, to_numpy
from vlmpo.data.records import IMAGE_PLACEHOLDER
from vlmpo.errors import RecordError
from vlmpo.hashing import content_hash, stable_hash

Indices = NDArray[np.int64]
Hashes = NDArray[np.uint64]

PATH = -1  # in place of the size of a medium that is not embedded
PIXELS = -2  # in place of the size of a PIL image, whose pixels are hashed
_SLICE = 1 << 14

# Of one record. Names and details are bytes because Arrow's strings cannot hold the surrogates that a path may.
SCHEMA = pa.schema(
    [
        ("record", pa.int64()),  # its number in the source
        ("words", pa.uint64()),  # words_hash of the prompt; 0 if the record is bad
        ("prompt", pa.uint64()),  # hash of the prompt as it is; 0 if the record is bad
        ("media", pa.list_(pa.large_binary())),  # encoded media: its images and then its videos, in order
        ("unread", pa.large_binary()),  # keys of which nothing was read, sorted, a zero byte between them
        ("fault", pa.large_binary()),  # reason and detail of the RecordError that reading it raised; null if it is good
    ]
)


class Medium(NamedTuple):
    """An image or video of a record.

    Attributes:
        kind: ``image`` or ``video``.
        size: bytes of an embedded one, PIXELS of a PIL image, PATH of all others.
        name: its path; if it is embedded, a hash of its content.
    """

    kind: str
    size: int
    name: str

    @classmethod
    def of(cls, value: Any, kind: str = "image") -> Medium:
        """Describe a path, encoded bytes or a PIL image."""
        if isinstance(value, str | os.PathLike):
            return cls(kind, PATH, os.fspath(value))
        if isinstance(value, bytes):
            return cls(kind, len(value), content_hash(value))
        return cls(kind, PIXELS, content_hash(value.tobytes()))

    @property
    def is_embedded(self) -> bool:
        """Whether its content is in the record itself."""
        return self.size != PATH

    def encode(self) -> bytes:
        """Return the medium as bytes."""
        return f"{self.kind} {self.size} {self.name}".encode("utf-8", "surrogatepass")

    @classmethod
    def decode(cls, content: bytes) -> Medium:
        """Return the medium that :meth:`encode` gave ``content`` for."""
        kind, size, name = content.decode("utf-8", "surrogatepass").split(" ", 2)
        return cls(kind, int(size), name)


def words_hash(text: str) -> int:
    """Return a hash of the words of a prompt that ignores case, spaces and image placeholders."""
    return stable_hash(" ".join(text.replace(IMAGE_PLACEHOLDER, " ").lower().split()))


def encode_keys(keys: Iterable[str]) -> bytes:
    """Return keys of a record, in any order, as bytes."""
    return "\0".join(sorted(map(str, keys))).encode("utf-8", "surrogatepass")


def encode_fault(error: RecordError) -> bytes:
    """Return the fault of a record that cannot be used."""
    return f"{error.reason} {error.detail}".encode("utf-8", "surrogatepass")


class Row(NamedTuple):
    """Holds the fields of SCHEMA for one record."""

    record: int
    words: int
    prompt: int
    media: Sequence[Medium] = ()
    unread: bytes = b""
    fault: bytes | None = None


def index_batch(rows: Sequence[Row]) -> pa.RecordBatch:
    """Return rows as a batch of SCHEMA."""
    bounds = np.cumsum([0, *(len(row.media) for row in rows)], dtype=np.int32)
    media = binary_to_arrow([medium.encode() for row in rows for medium in row.media])
    columns = [
        to_arrow(np.array([row.record for row in rows], np.int64)),
        to_arrow(np.array([row.words for row in rows], np.uint64)),
        to_arrow(np.array([row.prompt for row in rows], np.uint64)),
        pa.ListArray.from_arrays(to_arrow(bounds), media),
        binary_to_arrow([row.unread for row in rows]),
        binary_to_arrow([row.fault for row in rows]),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def index_table(batches: Sequence[pa.RecordBatch]) -> pa.Table:
    """Join batches of SCHEMA into a table that holds each medium, fault and set of keys once, in dictionaries."""
    table = pa.Table.from_batches(batches, SCHEMA)
    counts = [np.diff(to_numpy(chunk.offsets)) for chunk in table["media"].chunks]
    bounds = np.cumsum(np.concatenate([[0], *counts]), dtype=np.int32)
    names = pc.list_flatten(table["media"]).dictionary_encode().combine_chunks()
    columns = {name: table[name] for name in ("record", "words", "prompt")}
    columns["media"] = pa.ListArray.from_arrays(to_arrow(bounds), names)
    columns |= {name: table[name].dictionary_encode() for name in ("unread", "fault")}
    return pa.table(columns).combine_chunks()


class RecordIndex:
    """Records of one source, a row each, over a table as :func:`index_table` makes it.

    Attributes:
        records: int64 [rows], numbers of the records in the source.
        words: uint64 [rows], :func:`words_hash` of the prompt; 0 if the record is bad.
        prompts: uint64 [rows], hash of the prompt as it is; 0 if the record is bad.
        is_bad: bool [rows], whether the record cannot be used, whatever files there are.
        bounds: int32 [rows + 1], each row's part of ``media``.
        media: int32 [bounds[-1]], numbers of the images and videos that the rows show.
        media_count: how many numbers there are; a row may show none of them.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.records: Indices = to_numpy(table["record"])
        self.words: Hashes = to_numpy(table["words"])
        self.prompts: Hashes = to_numpy(table["prompt"])
        self._faults, media = one_chunk(table["fault"]), one_chunk(table["media"])
        self.is_bad: NDArray[np.bool_] = to_numpy(self._faults.is_valid().cast(pa.uint8())).view(np.bool_)
        self.bounds: NDArray[np.int32] = to_numpy(media.offsets)
        self.media: NDArray[np.int32] = to_numpy(media.values.indices)
        self._names = media.values.dictionary
        self.media_count = len(self._names)

    def __len__(self) -> int:
        return len(self.records)

    def find(self, records: Indices) -> Indices | None:
        """Return the rows of ``records`` in an index in which they ascend; None if one of them is not in it."""
        rows = np.searchsorted(self.records, records)
        is_past = bool(len(rows)) and rows.max() >= len(self)
        return None if is_past or not np.array_equal(self.records[rows], records) else rows

    def take(self, rows: Indices) -> RecordIndex:
        """Return an index of ``rows``, in that order. Its media keep their numbers."""
        if np.array_equal(rows, np.arange(len(self))):
            return self
        return RecordIndex(self.table.take(to_arrow(rows)))

    def error(self, row: int) -> tuple[str, str]:
        """Return reason and detail of the RecordError of a bad row."""
        reason, detail = self._faults[row].as_py().decode("utf-8", "surrogatepass").split(" ", 1)
        return reason, detail

    def unread_keys(self) -> Counter[str]:
        """Count the rows by each key of which nothing was read. Rows that are bad have none."""
        unread = one_chunk(self.table["unread"])
        rows = np.bincount(to_numpy(unread.indices), minlength=len(unread.dictionary)).tolist()
        counts: Counter[str] = Counter()
        for keys, number in zip(unread.dictionary.to_pylist(), rows, strict=True):
            if keys and number:
                counts.update(dict.fromkeys(keys.decode("utf-8", "surrogatepass").split("\0"), number))
        return counts

    def shown(self, row: int) -> NDArray[np.int32]:
        """Return the numbers of the images and videos that ``row`` shows, in order."""
        return self.media[self.bounds[row] : self.bounds[row + 1]]

    def shown_media(self) -> Iterator[tuple[int, Medium]]:
        """Yield number and description of every image and video that a row shows, each once."""
        return self.describe(np.flatnonzero(np.bincount(self.media)))

    def describe(self, numbers: NDArray[Any]) -> Iterator[tuple[int, Medium]]:
        """Yield number and description of images and videos."""
        for start in range(0, len(numbers), _SLICE):
            part = numbers[start : start + _SLICE]
            for number, name in zip(part.tolist(), self._names.take(to_arrow(part)).to_pylist(), strict=True):
                yield number, Medium.decode(name)

    def shows_any(self, is_wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return whether a row shows any wanted medium, bool [rows], given bool [media_count]."""
        counts = np.zeros(len(self.media) + 1, np.int64)
        np.cumsum(is_wanted[self.media], out=counts[1:])
        return np.diff(counts[self.bounds]) > 0
