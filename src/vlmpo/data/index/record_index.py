"""What has to be known of every record of a source before training, in arrays: no Python object a record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.index.hashing import stable_hash

Indices = NDArray[np.int64]
Hashes = NDArray[np.uint64]

IMAGE, VIDEO, EMBEDDED_IMAGE, EMBEDDED_VIDEO = range(4)  # kinds of media; the first two are paths
_SLICE = 1 << 14


class Strings(NamedTuple):
    """Texts end to end: ``data`` uint8 [bytes] in UTF-8, ``bounds`` int64 [texts + 1]."""

    data: NDArray[np.uint8]
    bounds: Indices

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """The texts, half characters too."""
        return cls._joined([text.encode("utf-8", "surrogatepass") for text in texts])

    @classmethod
    def _joined(cls, parts: Sequence[Any]) -> Strings:
        sizes = np.fromiter((len(part) for part in parts), np.int64, len(parts))
        return cls(np.frombuffer(b"".join(parts), np.uint8), bounds_of(sizes))

    @classmethod
    def concatenated(cls, parts: Sequence[Strings]) -> Strings:
        """All texts of ``parts`` in order."""
        sizes = np.concatenate([np.empty(0, np.int64), *(np.diff(part.bounds) for part in parts)])
        return cls(np.concatenate([np.empty(0, np.uint8), *(part.data for part in parts)]), bounds_of(sizes))

    def at(self, index: int) -> str:
        """Text ``index``, from 0."""
        return self.data[self.bounds[index] : self.bounds[index + 1]].tobytes().decode("utf-8", "surrogatepass")

    def texts(self, indices: Indices) -> Iterator[str]:
        """The texts at ``indices``, one after the other."""
        data = memoryview(self.data)  # type: ignore[arg-type]
        for start in range(0, len(indices), _SLICE):
            some = indices[start : start + _SLICE]
            for begin, end in zip(self.bounds[some].tolist(), self.bounds[some + 1].tolist(), strict=True):
                yield str(data[begin:end], "utf-8", "surrogatepass")

    def take(self, indices: Indices) -> Strings:
        """The texts at ``indices``, in that order."""
        taken = [Strings.of(())]
        for start in range(0, len(indices), _SLICE):
            some = indices[start : start + _SLICE]
            pairs = zip(self.bounds[some].tolist(), self.bounds[some + 1].tolist(), strict=True)
            taken.append(self._joined([self.data[begin:end] for begin, end in pairs]))
        return Strings.concatenated(taken)


def bounds_of(sizes: NDArray[Any]) -> Indices:
    """Where pieces of these sizes begin and end, laid end to end: int64 [pieces + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def distinct(ascending: Indices) -> Indices:
    """The values, each once; ``np.unique`` without the sorting."""
    return ascending[np.diff(ascending, prepend=ascending[:1] - 1) > 0]


def take_pieces(bounds: Indices, values: NDArray[Any], indices: Indices) -> tuple[Indices, NDArray[Any]]:
    """Bounds and values of the pieces at ``indices``, laid end to end anew."""
    starts, sizes = bounds[indices], bounds[indices + 1] - bounds[indices]
    taken = bounds_of(sizes)
    at = np.arange(taken[-1]) - np.repeat(taken[:-1] - starts, sizes)
    return taken, values[at]


@dataclass(frozen=True)
class RecordIndex:
    """Records of one source, and the images and videos they name, each once.

    Attributes:
        records: int64 [records], which records of the source, ascending.
        words: uint64 [records], :func:`vlmpo.data.index.hashing.words_hash` of the prompt; 0 where it is bad.
        texts: uint64 [records], hash of the prompt as it is; 0 where it is bad.
        bounds: int64 [records + 1], each record's part of ``media``.
        media: int32, which images and then videos, in order.
        keys: uint64 [media], hash of kind and name, ascending.
        kinds: uint8 [media], IMAGE, VIDEO, EMBEDDED_IMAGE or EMBEDDED_VIDEO.
        names: the path, or 32 hexadecimal digits that stand for the content.
        sizes: int64 [media], bytes of an embedded one; -1 for a path.
        bad: int64 [bad], positions in ``records`` of those that cannot be used, whatever files there are.
        reasons, details: why, as in RecordError.
    """

    records: Indices
    words: Hashes
    texts: Hashes
    bounds: Indices
    media: NDArray[np.int32]
    keys: Hashes
    kinds: NDArray[np.uint8]
    names: Strings
    sizes: Indices
    bad: Indices
    reasons: Strings
    details: Strings

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Plain arrays by name; inverse of :meth:`from_arrays`."""
        found: dict[str, NDArray[Any]] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Strings):
                found |= {f"{entry.name}.data": value.data, f"{entry.name}.bounds": value.bounds}
            else:
                found[entry.name] = value
        return found

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> RecordIndex:
        """Inverse of :meth:`arrays`."""
        texts: dict[str, Any] = {
            name: Strings(arrays[f"{name}.data"], arrays[f"{name}.bounds"]) for name in ("names", "reasons", "details")
        }
        plain: dict[str, Any] = {name: array for name, array in arrays.items() if "." not in name}
        return cls(**plain, **texts)

    def shown(self, media: NDArray[np.int32]) -> NDArray[np.bool_]:
        """bool [media of the source], which of them are in ``media``."""
        found = np.zeros(len(self.keys), np.bool_)
        found[media] = True
        return found

    def positions(self, records: Indices) -> Indices:
        """Where ``records`` stand in ``self.records``, all of which are there."""
        return np.searchsorted(self.records, records).astype(np.int64)

    def covers(self, records: Indices) -> bool:
        """Whether all of ``records`` (ascending) were looked at."""
        if not len(records):
            return True
        at = np.searchsorted(self.records, records)
        return bool(at[-1] < len(self.records)) and np.array_equal(self.records[at], records)

    @classmethod
    def merged(cls, parts: Sequence[RecordIndex]) -> RecordIndex:
        """The facts of several parts of one source, in order."""
        if len(parts) == 1:
            return parts[0]
        keys, first, known = np.unique(
            np.concatenate([part.keys for part in parts]), return_index=True, return_inverse=True
        )
        before = bounds_of(np.array([len(part.keys) for part in parts]))
        records_before = bounds_of(np.array([len(part.records) for part in parts]))
        media = [known[start + part.media] for part, start in zip(parts, before.tolist(), strict=False)]
        bad = [part.bad + start for part, start in zip(parts, records_before.tolist(), strict=False)]
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in ("records", "words", "texts")
        }
        return cls(
            **joined,
            bounds=bounds_of(np.concatenate([np.diff(part.bounds) for part in parts])),
            media=np.concatenate(media).astype(np.int32),
            keys=keys,
            kinds=np.concatenate([part.kinds for part in parts])[first],
            names=Strings.concatenated([part.names for part in parts]).take(first),
            sizes=np.concatenate([part.sizes for part in parts])[first],
            bad=np.concatenate(bad),
            reasons=Strings.concatenated([part.reasons for part in parts]),
            details=Strings.concatenated([part.details for part in parts]),
        )


@dataclass
class RecordIndexBuilder:
    """Gathers the facts of a few records, one after the other."""

    words: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # media of each record
    media: list[int] = field(default_factory=list)
    known: dict[tuple[int, str], int] = field(default_factory=dict)  # (kind, name): number
    bytes: list[int] = field(default_factory=list)
    bad: list[tuple[int, str, str]] = field(default_factory=list)

    def good(self, words: int, text: int, media: Sequence[tuple[int, str, int]]) -> None:
        """A record that can be used: its hashes, and kind, name and size of its images and videos."""
        self.words.append(words)
        self.texts.append(text)
        self.sizes.append(len(media))
        for kind, name, size in media:
            number = self.known.setdefault((kind, name), len(self.known))
            if number == len(self.bytes):
                self.bytes.append(size)
            self.media.append(number)

    def unusable(self, reason: str, detail: str) -> None:
        """A record that cannot be used."""
        self.bad.append((len(self.words), reason, detail))
        self.good(0, 0, ())

    def facts(self, records: Indices) -> RecordIndex:
        """The facts of ``records``, as many as were gathered."""
        unsorted = np.array([stable_hash(f"{kind}:{name}") for kind, name in self.known], np.uint64)
        order = np.argsort(unsorted, kind="stable")
        return replace(
            self._unordered(records),
            media=np.argsort(order, kind="stable").astype(np.int32)[np.array(self.media, np.int64)],
            keys=unsorted[order],
            kinds=np.array([kind for kind, _ in self.known], np.uint8)[order],
            names=Strings.of(name for _, name in self.known).take(order),
            sizes=np.array(self.bytes, np.int64)[order],
        )

    def _unordered(self, records: Indices) -> RecordIndex:
        return RecordIndex(
            records=records,
            words=np.array(self.words, np.uint64),
            texts=np.array(self.texts, np.uint64),
            bounds=bounds_of(np.array(self.sizes, np.int64)),
            media=np.empty(0, np.int32),
            keys=np.empty(0, np.uint64),
            kinds=np.empty(0, np.uint8),
            names=Strings.of(()),
            sizes=np.empty(0, np.int64),
            bad=np.array([at for at, _, _ in self.bad], np.int64),
            reasons=Strings.of(reason for _, reason, _ in self.bad),
            details=Strings.of(detail for _, _, detail in self.bad),
        )
