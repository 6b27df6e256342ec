"""Sets of preference pairs, read where they lie and in whatever format they are, as one data set by index.

A record is read and parsed when it is asked for; ``jsonfiles`` and ``tables`` hold no more of a file than where its
records are. What a pass over all records found is in :class:`vlmpo.data.index.record_index.RecordIndex`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.formats import RecordContext, recognise
from vlmpo.data.index.hashing import stable_hash
from vlmpo.data.index.record_index import Indices, RecordIndex, distinct
from vlmpo.data.index.scan import Progress, Survey, survey
from vlmpo.data.index.store import Cache
from vlmpo.data.readers.containers import head, open_records
from vlmpo.data.readers.json import JsonRecords
from vlmpo.data.readers.spec import FileSpec, SourceSpec, file_specs
from vlmpo.data.records import PreferencePair
from vlmpo.errors import DataError


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What a source was found to be.

    Attributes:
        name: what metrics call it.
        container: what its records lie in, e.g. ``JSON Lines``.
        format: name of the format of its records.
        title: what people call that format.
        why: what it was told by.
        records: how many it holds, good or bad, before any repeat.
    """

    name: str
    container: str
    format: str
    title: str
    why: str
    records: int


class _Source:
    """One source: its records, and the format they are in."""

    def __init__(self, spec: FileSpec, name: str, cache: Cache) -> None:
        self.name = name
        self._cache = cache
        self._facts: dict[bool, RecordIndex] = {}  # by need_rejected: the last ones that were asked for
        self._reads_as = (spec.kind, spec.path, spec.split, spec.subset, spec.image_root)
        self.path = spec.path
        self.image_root = spec.image_root
        self.max_tiles = spec.max_tiles
        self.records = open_records(spec, cache)
        # Of a copy, which opens the file for itself: a file that changes before it is read in earnest is then refused.
        self.recognised = recognise(head(copy.copy(self.records)), spec.format, spec.path)

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_facts": {}}  # other processes read pairs

    @property
    def info(self) -> SourceInfo:
        found = self.recognised.format
        return SourceInfo(self.name, self.records.kind, found.name, found.title, self.recognised.why, len(self))

    def pair(self, index: int, need_rejected: bool) -> PreferencePair:
        record, origin = self.records.record(index), self.records.origin(index)
        context = RecordContext(origin, self.name, self.image_root, self.max_tiles, need_rejected)
        return self.recognised.format.parse(record, context)

    def facts(
        self, records: Indices, need_rejected: bool, progress: Progress | None, waiting: Callable[[], None] | None
    ) -> RecordIndex:
        """The facts of ``records``, ascending, and perhaps of others."""
        known = self._facts.get(need_rejected)
        if known is None or not known.covers(records):
            settings = (*self._reads_as, self.recognised.format.name)
            in_lines = isinstance(self.records, JsonRecords)  # Arrow has threads of its own, which no fork survives
            asked = Survey(self, records, need_rejected, self.records.stamp, settings, can_fork=in_lines)
            known = self._facts[need_rejected] = survey(asked, self._cache, progress, waiting)
        return known


class SourceRows(NamedTuple):
    """Pairs of one source.

    Attributes:
        name: of the source.
        facts: of its records, at least of those that are pairs.
        at: int64 [pairs], which pairs of the data set, ascending.
        records: int64 [pairs], their records in the source.
    """

    name: str
    facts: RecordIndex
    at: Indices
    records: Indices


class PairDataset:
    """Preference pairs of one or several files, by index; a pair is read and checked when it is asked for.

    Made by :func:`open_pairs`. Picklable; each process opens the files for itself.

    Attributes:
        notices: what the user should know about the sources though nothing is wrong with them, e.g. keys of no effect.
        need_rejected: whether pairs are for preference training. If not, ``rejected`` is not looked at and None.
        source_names: names of the sources, in the order they were named.
    """

    def __init__(
        self, files: Sequence[_Source], rows: Indices, need_rejected: bool, notices: list[str], cache: Cache
    ) -> None:
        self._files = list(files)
        self._bounds = np.cumsum([0, *(len(file) for file in files)])  # [files + 1]: records before each file
        self._rows = rows  # [pairs]: record numbers, counted through all files
        self.need_rejected = need_rejected
        self.notices = notices
        self._cache = cache
        self.source_names = [file.name for file in files]

    @property
    def paths(self) -> list[str]:
        """The files behind the pairs, each once."""
        return list(dict.fromkeys(path for file in self._files for path in file.records.paths))

    @property
    def infos(self) -> list[SourceInfo]:
        """What each source was found to be, in the order they were named."""
        return [file.info for file in self._files]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PreferencePair:
        """Pair ``index``; its images are absolute paths, whose existence is not looked at here, or encoded bytes.

        Raises:
            RecordError: ``bad_json``, ``missing_field``, ``ambiguous_field``, ``unsupported_field``,
                ``bad_conversation``, ``prompts_differ``, ``unpaired_feedback``, ``placeholder_mismatch``,
                ``missing_image`` or ``missing_video`` (a web address), ``empty_response`` or ``identical``.
        """
        file, record = self._locate(index)
        return file.pair(record, self.need_rejected)

    def origin(self, index: int) -> str:
        """``file:line`` of pair ``index``, without reading it."""
        file, record = self._locate(index)
        return file.records.origin(record)

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
        return PairDataset(self._files, rows, need_rejected, self.notices, self._cache)

    def _locate(self, index: int) -> tuple[_Source, int]:
        row = int(self._rows[index])  # IndexError past the end, as sequences have it
        position = int(np.searchsorted(self._bounds, row, side="right")) - 1
        return self._files[position], row - int(self._bounds[position])

    def fingerprint(self) -> str:
        """Tells this data set from others, and from itself after a change of its files; no record is read for it."""
        digest = blake2b(self._rows.tobytes(), digest_size=16)
        for file in self._files:
            digest.update(f"{file.name} {file.image_root} {file.max_tiles} {file.recognised.format.name}".encode())
            for path in file.records.paths:
                state = os.stat(path) if os.path.exists(path) else None
                digest.update(f"{path} {state and (state.st_size, state.st_mtime_ns)} {self.need_rejected}".encode())
        return digest.hexdigest()

    def surveyed(
        self, progress: Progress | None = None, waiting: Callable[[str], None] | None = None
    ) -> Iterator[SourceRows]:
        """What has to be known of every pair, source by source, from the cache or by reading every record once.

        Args:
            progress: called now and then with (records read, records in all).
            waiting: called with the path of a source that another process reads just now; its result is waited for.
        """
        order = np.argsort(self._rows, kind="stable")  # sources follow each other
        bounds = np.searchsorted(self._rows[order], self._bounds)
        parts = []
        for file, first, begin, end in zip(self._files, self._bounds, bounds, bounds[1:], strict=False):
            at = np.sort(order[begin:end])
            records = self._rows[at] - first
            parts.append((file, at, records, distinct(self._rows[order[begin:end]] - first)))
        total, before = sum(len(needed) for *_, needed in parts), 0
        for file, at, records, needed in parts:
            shown = None if progress is None else functools.partial(_shifted, progress, before, total)
            told = None if waiting is None else functools.partial(waiting, file.path)
            yield SourceRows(file.name, file.facts(needed, self.need_rejected, shown, told), at, records)
            before += len(needed)
        _note_trouble(self._cache, self.notices)

    def common_root(self) -> str:
        """The deepest folder above all image roots."""
        return os.path.commonpath([os.path.normpath(file.image_root) for file in self._files])


def _note_trouble(cache: Cache, notices: list[str]) -> None:
    """The cache's notice, once."""
    trouble = cache.notice()
    if trouble is not None and trouble not in notices:
        notices.append(trouble)


def _shifted(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def open_pairs(specs: Sequence[SourceSpec], *, seed: int = 0, need_rejected: bool = True) -> PairDataset:
    """Opens the files named by ``specs``. Reads each for its line offsets, unless the cache has them; parses no record.

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
    cache = Cache()
    files: list[_Source] = []
    rows: list[Indices] = [np.empty(0, np.int64)]
    records_before = 0
    for spec in itertools.chain.from_iterable(file_specs(named, notices) for named in specs):
        file = _Source(spec, _free_name(spec.name, {file.name for file in files}), cache)
        if spec.declared_length is not None and spec.declared_length != len(file):
            notices.append(f"{file.name}: meta.json says length {spec.declared_length}, {file.path} has {len(file)}")
        drawn = _repeated(len(file), spec.repeat, f"{seed}:{file.name}")
        if not len(drawn):
            notices.append(f"{file.name}: adds no pair ({len(file)} records in {file.path}, repeat {spec.repeat:g})")
        files.append(file)
        rows.append(drawn + records_before)
        records_before += len(file)
    _note_trouble(cache, notices)
    dataset = PairDataset(files, np.concatenate(rows), need_rejected, notices, cache)
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
