"""Open files of preference pairs, in any known format, as one data set by index.

A record is read and parsed on access; the readers hold no more of a file than where its records are. The result of one
pass over all records is a :class:`vlmpo.data.index.record_index.RecordIndex`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.formats import RecordContext, recognise
from vlmpo.data.formats.detect import HEAD
from vlmpo.data.index.record_index import Indices, RecordIndex
from vlmpo.data.index.scan import Progress, scan
from vlmpo.data.index.store import Cache, ignore
from vlmpo.data.readers.arrow import TableRecords, load_named, open_parquet, open_saved
from vlmpo.data.readers.json import JsonRecords
from vlmpo.data.readers.spec import FileSpec, SourceSpec, file_specs
from vlmpo.data.readers.split import records_to_use
from vlmpo.data.records import PreferencePair, one_record
from vlmpo.errors import DataError, RecordError, shorten
from vlmpo.hashing import content_hash, stable_hash

MAX_PAIRS = 1 << 28  # repeats included; the number of each takes 8 bytes

# Both are picklable, and each process opens the files for itself.
Records = JsonRecords | TableRecords


def open_records(spec: FileSpec, cache: Cache) -> Records:
    """Open what ``spec`` names. Raises DataError if it cannot be read."""
    if spec.kind == "parquet":
        return open_parquet(spec.files)
    if spec.kind == "saved":
        return open_saved(spec.path, spec.split)
    if spec.kind in ("folder", "hub"):
        return load_named(spec.path, spec.subset, spec.split, is_folder=spec.kind == "folder", files_in=spec.folder)
    return JsonRecords(spec.path, is_array=spec.kind == "array", cache=cache)


def head_of(records: Records) -> list[Mapping[str, Any]]:
    """Read the first few records, without those that cannot be read."""
    head: list[Mapping[str, Any]] = []
    for index in range(min(HEAD, len(records))):
        try:
            head.append(records.record(index))
        except RecordError:
            continue
    return head


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """Describes a source.

    Attributes:
        name: what metrics call it.
        container: what its records are stored in, e.g. ``JSON Lines``.
        format: name of the format of its records.
        title: what users call that format.
        why: on which grounds the format was chosen.
        records: how many it holds, good or bad, before any repeat.
    """

    name: str
    container: str
    format: str
    title: str
    why: str
    records: int


class _Source:
    """The records of one source, and the format they are in."""

    def __init__(self, spec: FileSpec, records: Records, name: str, need_rejected: bool, cache: Cache) -> None:
        self.name = name
        self.need_rejected = need_rejected
        self.path = spec.path
        self.image_root = spec.image_root
        self.paths = spec.paths
        self.max_tiles = spec.max_tiles
        self.columns = spec.columns
        self._cache = cache
        self._index: RecordIndex | None = None  # the last one made
        self.records = records
        # The copy opens the file for itself, so that a change of the file before the first real read is noticed.
        head = head_of(copy.copy(self.records))
        self.recognised = recognise(head, spec.format, spec.path, need_rejected=need_rejected)
        if isinstance(self.records, JsonRecords) and not self.recognised.format.is_ranking:
            self.records = self.records.with_numbers_as_written()  # answers: 2.50 is not 2.5
        if self.columns is not None:
            self.recognised = replace(self.recognised, why="as dataset_info.json says")
        self.stamp = self.records.stamp
        self.can_fork = isinstance(self.records, JsonRecords)  # Arrow has threads of its own, which no fork survives
        read_as = (spec.kind, spec.path, spec.split, spec.subset, spec.image_root, spec.folder, repr(spec.columns))
        self.settings = (*read_as, repr(spec.paths), self.recognised.format.name, need_rejected)

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}  # other processes read pairs only

    def pair(self, index: int) -> PreferencePair:
        """Read pair ``index``. Raises RecordError."""
        return self._read(index)[0]

    def forms(self, index: int) -> set[str]:
        """Return the forms in which pair ``index`` gives its images and videos. Raises RecordError."""
        return self._read(index)[1]

    def _read(self, index: int) -> tuple[PreferencePair, set[str]]:
        record, origin = self.records.record(index), self.records.origin(index)
        context = RecordContext(
            origin, self.name, self.image_root, self.max_tiles, self.need_rejected, paths=self.paths
        )
        with one_record(origin):
            if self.columns is not None:
                record = self.columns.renamed(record, context)
            return self.recognised.format.parse(record, context), context.forms

    def index(self, records: Indices, progress: Progress, waiting: Callable[[], None]) -> RecordIndex:
        """Return an index of at least ``records``, ascending."""
        if self._index is None or self._index.find(records) is None:
            self._index = scan(self, records, cache=self._cache, progress=progress, waiting=waiting)
        return self._index


@dataclass(frozen=True)
class ScannedSource:
    """Holds the index of one source of a data set.

    Attributes:
        name: name of the source.
        pairs: int64 [pairs], indices in the data set of the source's pairs, ascending.
        index: a row for each of these pairs, in that order.
        image_root: the folder that its relative paths start from.
    """

    name: str
    pairs: Indices
    index: RecordIndex
    image_root: str


class PairDataset:
    """Preference pairs of one or several files, by index; a pair is read and checked on access.

    Made by :func:`open_pairs`. Picklable; each process opens the files for itself.

    Attributes:
        source_names: names of the sources, in the order given.
    """

    def __init__(self, files: Sequence[_Source], rows: Indices, notices: list[str], cache: Cache) -> None:
        self._files = list(files)
        self._bounds = np.cumsum([0, *(len(file) for file in files)])  # [files + 1]: records before each file
        self._rows = rows  # [pairs]: record numbers, counted through all files
        self._notices = notices
        self._cache = cache
        self.source_names = [file.name for file in files]

    @property
    def notices(self) -> list[str]:
        """List remarks on the sources that are no errors, e.g. keys without effect."""
        return [*self._notices, *self._cache.notices]

    @property
    def paths(self) -> list[str]:
        """List the files behind the pairs, each once."""
        return list(dict.fromkeys(path for file in self._files for path in file.records.paths))

    @property
    def infos(self) -> list[SourceInfo]:
        """Describe each source, in the order given."""
        return [
            SourceInfo(
                name=file.name,
                container=file.records.kind,
                format=file.recognised.format.name,
                title=file.recognised.format.title,
                why=file.recognised.why,
                records=len(file),
            )
            for file in self._files
        ]

    @property
    def tile_limits(self) -> list[int | None]:
        """List each source's own ``max_tiles``, in the order given."""
        return [file.max_tiles for file in self._files]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PreferencePair:
        """Read pair ``index``. Its images are encoded bytes, or absolute paths of files that may not exist.

        Raises RecordError if the record cannot be used.
        """
        file, record = self._locate(index)
        return file.pair(record)

    def origin(self, index: int) -> str:
        """Return ``file:line`` of pair ``index``, without reading it."""
        file, record = self._locate(index)
        return file.records.origin(record)

    def source(self, index: int) -> str:
        """Return the name of the source of pair ``index``, without reading it."""
        return self._locate(index)[0].name

    def forms(self, index: int) -> set[str]:
        """Read in which forms pair ``index`` gives its images and videos. Raises RecordError."""
        file, record = self._locate(index)
        return file.forms(record)

    def select(self, indices: NDArray[Any] | Sequence[int]) -> PairDataset:
        """Return a view of the pairs at ``indices``, in that order."""
        return PairDataset(self._files, self._rows[np.asarray(indices, np.int64)], self._notices, self._cache)

    def _locate(self, index: int) -> tuple[_Source, int]:
        row = int(self._rows[index])  # IndexError past the end, as sequences have it
        position = int(np.searchsorted(self._bounds, row, side="right")) - 1
        return self._files[position], row - int(self._bounds[position])

    def fingerprint(self) -> str:
        """Return a hash that changes with the pairs, their settings, or their files; reads no record."""
        parts: list[str | bytes] = [self._rows.tobytes()]
        for file in self._files:
            parts.append(f"{file.name} {file.image_root} {file.max_tiles} {file.recognised.format.name}")
            parts.append("" if file.columns is None else repr(file.columns))
            for path in file.records.paths:
                state = os.stat(path) if os.path.exists(path) else None
                parts.append(f"{path} {state and (state.st_size, state.st_mtime_ns)} {file.need_rejected}")
        return content_hash(*parts)

    def scan(self, progress: Progress = ignore, waiting: Callable[[str], None] = ignore) -> Iterator[ScannedSource]:
        """Yield an index of the pairs of each source, from the cache or by reading every record once.

        Args:
            progress: called now and then with (records read, records in all).
            waiting: called with the path of a source that another process is reading, before waiting for it.
        """
        source_of = np.searchsorted(self._bounds, self._rows, side="right") - 1
        ends = np.cumsum(np.bincount(source_of, minlength=len(self._files)))
        pairs_of = np.split(np.argsort(source_of, kind="stable"), ends[:-1])
        del source_of  # one number a pair

        total, done = int(np.count_nonzero(np.bincount(self._rows))), 0

        def show(records_read: int, _: int) -> None:
            progress(done + records_read, total)

        for pairs, file, start in zip(pairs_of, self._files, self._bounds[:-1], strict=True):
            records = self._rows[pairs] - start
            distinct = np.flatnonzero(np.bincount(records))  # np.unique takes ten times as long
            index = file.index(distinct, show, functools.partial(waiting, file.path))
            rows = index.find(records)
            assert rows is not None
            yield ScannedSource(file.name, pairs, index.take(rows), file.image_root)
            done += len(distinct)

    def common_root(self) -> str:
        """Return the deepest folder above all image roots."""
        return os.path.commonpath([os.path.normpath(file.image_root) for file in self._files])


def open_pairs(specs: Sequence[SourceSpec], *, seed: int = 0, need_rejected: bool = True) -> PairDataset:
    """Open the files named by ``specs``. Reads each to find its records, unless the cache has them.

    Args:
        specs: the sources, in order; a repeated source's pairs follow each other, repeat after repeat.
        seed: draws the pairs for the fractional part of a ``repeat``; each source is drawn independently of the others.
        need_rejected: False for supervised fine-tuning: ``rejected`` may be absent or anything, and is read as None.

    Raises:
        DataError: a file or folder that does not exist (every path tried is named), a malformed meta.json, a bad
            setting, or no pair at all.
    """
    notices: list[str] = []
    cache = Cache()
    files: list[_Source] = []
    rows: list[Indices] = [np.empty(0, np.int64)]
    records_before = 0
    for spec in itertools.chain.from_iterable(file_specs(source, notices, need_rejected) for source in specs):
        records = open_records(spec, cache)
        used = records_to_use(records, spec, cache)
        file = _Source(spec, records, _free_name(spec.name, {file.name for file in files}), need_rejected, cache)
        if spec.declared_length is not None and spec.declared_length != len(file):
            said = shorten(repr(spec.declared_length))
            notices.append(f"{file.name}: meta.json says length {said}, {file.path} has {len(file)}")
        repeat = spec.repeat
        if spec.num_samples is not None and len(used):
            repeat *= spec.num_samples / len(used)
        drawn = used[_repeated(file.name, len(used), repeat, seed)]
        if not len(drawn):
            notices.append(f"{file.name}: adds no pair ({len(used)} records in {file.path}, repeat {repeat:g})")
        files.append(file)
        rows.append(drawn + records_before)
        records_before += len(file)
    dataset = PairDataset(files, np.concatenate(rows), notices, cache)
    if not len(dataset):
        raise DataError(f"no pair in {', '.join(source.path for source in specs) or 'the data: no source is named'}")
    return dataset


def _free_name(name: str, taken: set[str]) -> str:
    """Return ``name``, or ``name-2``, ``name-3``, ...: counts and metrics of two sources must stay apart."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def _repeated(name: str, records: int, repeat: float, seed: int) -> Indices:
    """Return record numbers for ``repeat`` passes: whole ones, then a seeded subset in file order for the fraction."""
    total = round(records * repeat)
    if total > MAX_PAIRS:
        raise DataError(f"{name}: repeat {repeat:g} makes {total} pairs of {records} records, at most {MAX_PAIRS}")
    whole, rest = divmod(total, records) if records else (0, 0)
    generator = np.random.default_rng(stable_hash(f"{seed}:{name}"))
    subset = np.sort(generator.choice(records, rest, replace=False)) if rest else np.empty(0, np.int64)
    return np.concatenate([np.tile(np.arange(records, dtype=np.int64), whole), subset])
