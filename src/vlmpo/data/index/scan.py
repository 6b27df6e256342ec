"""One pass over the records of a source, in several processes where it is long; what it finds is kept in the cache."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import numpy as np

from vlmpo.data.index.hashing import stable_hash, words_hash
from vlmpo.data.index.record_index import (
    EMBEDDED_IMAGE,
    EMBEDDED_VIDEO,
    IMAGE,
    VIDEO,
    Indices,
    RecordIndex,
    RecordIndexBuilder,
)
from vlmpo.data.index.store import Cache, Stamp
from vlmpo.data.records import PreferencePair
from vlmpo.errors import RecordError

_CHUNK = 1000  # records
# Below, starting processes takes longer than they save.
MIN_PARALLEL = 20_000
_MAX_PROCESSES = 16

Progress = Callable[[int, int], None]


class Readable(Protocol):
    """What can be surveyed: records that become pairs one by one."""

    def __len__(self) -> int: ...

    def pair(self, index: int, need_rejected: bool) -> PreferencePair:
        """Pair ``index``. Raises RecordError."""


class Survey(NamedTuple):
    """What is asked: which records of ``source``, for which purpose.

    Attributes:
        stamp: the files behind the source in the state in which they were opened; None: nothing is kept.
        settings: JSON values, what beside the files decides how a record is read.
        can_fork: whether several processes may read the source.
    """

    source: Readable
    records: Indices
    need_rejected: bool
    stamp: Stamp | None
    settings: tuple[Any, ...]
    can_fork: bool


def survey(asked: Survey, cache: Cache, progress: Progress | None, waiting: Callable[[], None] | None) -> RecordIndex:
    """The facts of the records, ascending, from the cache or read now; the same whatever the number of processes.

    Args:
        asked: which records of which source.
        cache: where the facts are kept.
        progress: called now and then with (records read, records in all).
        waiting: called where another process reads the same source just now, and this one waits for it.

    Raises:
        DataError: the files changed since they were opened.
    """
    total = len(asked.records)
    part = None if total == len(asked.source) else blake2b(asked.records.tobytes(), digest_size=16).hexdigest()
    settings = (*asked.settings, asked.need_rejected, len(asked.source), part)

    def make() -> dict[str, Any]:
        parts = []
        done = 0
        for found in _parts(asked, each_rank_reads=asked.stamp is None or cache.problem is not None):
            parts.append(found)
            done += len(found.records)
            if progress is not None and done < total:
                progress(done, total)
        return (RecordIndex.merged(parts) if parts else RecordIndexBuilder().facts(asked.records)).arrays()

    facts = RecordIndex.from_arrays(cache.arrays("facts", asked.stamp, settings, make, waiting))
    if progress is not None and total:
        progress(total, total)
    return facts


def _parts(asked: Survey, each_rank_reads: bool) -> Iterator[RecordIndex]:
    """The facts of every _CHUNK records, in order."""
    chunks = [asked.records[start : start + _CHUNK] for start in range(0, len(asked.records), _CHUNK)]
    processes = _processes(each_rank_reads) if asked.can_fork and len(asked.records) >= MIN_PARALLEL else 1
    if processes == 1:
        yield from map(_facts, repeat(asked.source), chunks, repeat(asked.need_rejected))
        return
    # Forked, the processes have the source already; one that dies raises here instead of leaving this one waiting.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _set_source, (asked.source, asked.need_rejected)) as pool:
        try:
            yield from pool.map(_facts_of_source, chunks)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _processes(each_rank_reads: bool) -> int:
    """How many processes may read: the cores of this job, shared with the other ranks where each reads for itself."""
    if not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        return 1
    cores = len(os.sched_getaffinity(0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if each_rank_reads else 1
    return max(1, min(cores // max(ranks, 1), _MAX_PROCESSES))


_forked: tuple[Readable, bool] | None = None


def _set_source(source: Readable, need_rejected: bool) -> None:
    global _forked
    _forked = source, need_rejected


def _facts_of_source(records: Indices) -> RecordIndex:
    assert _forked is not None
    return _facts(_forked[0], records, _forked[1])


def _facts(source: Readable, records: Indices, need_rejected: bool) -> RecordIndex:
    """The facts of a few records."""
    found = RecordIndexBuilder()
    for record in records.tolist():
        try:
            pair = source.pair(record, need_rejected)
        except RecordError as error:
            found.unusable(error.reason, error.detail)
            continue
        texts = [message.text for message in pair.prompt]
        media = [_medium(image, IMAGE) for image in pair.images] + [_medium(video, VIDEO) for video in pair.videos]
        found.good(words_hash(" ".join(texts)), stable_hash("text:" + "\n".join(texts)), media)
    return found.facts(np.asarray(records, np.int64))


def _medium(medium: Any, kind: int) -> tuple[int, str, int]:
    """Kind, name and size of an image or video: a path, or the hash of its content where it is embedded."""
    if isinstance(medium, bytes):
        kind = EMBEDDED_IMAGE if kind == IMAGE else EMBEDDED_VIDEO
        return kind, blake2b(medium, digest_size=16).hexdigest(), len(medium)
    return kind, medium, -1
