"""Read the records of a source once, by several processes if there are many, and keep the result in the cache."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Protocol

import pyarrow as pa

from vlmpo.data.formats.assemble import unread_keys
from vlmpo.data.index.record_index import (
    Indices,
    Medium,
    RecordIndex,
    Row,
    encode_fault,
    encode_keys,
    index_batch,
    index_table,
    words_hash,
)
from vlmpo.data.index.store import Cache, Stamp
from vlmpo.data.records import PreferencePair, one_record
from vlmpo.errors import RecordError
from vlmpo.hashing import content_hash, stable_hash

_CHUNK = 1000  # records
# Below, starting processes takes longer than they save.
MIN_PARALLEL = 20_000
_MAX_PROCESSES = 16

Progress = Callable[[int, int], None]


class Readable(Protocol):
    """Records that become pairs one by one.

    Attributes:
        stamp: state of the files behind the records when they were opened; None keeps nothing.
        settings: JSON values: all else that decides how a record is read.
        can_fork: whether forked processes may read the records.
    """

    stamp: Stamp | None
    settings: tuple[Any, ...]
    can_fork: bool

    def __len__(self) -> int: ...

    def pair(self, index: int) -> PreferencePair:
        """Read pair ``index``. Raises RecordError."""


def scan(
    source: Readable,
    records: Indices,
    *,
    cache: Cache,
    progress: Progress,
    waiting: Callable[[], None],
) -> RecordIndex:
    """Return an index of ``records``, from the cache or by reading them; the same by any number of processes.

    Args:
        source: the records of a file or table.
        records: int64 [records], their numbers, ascending.
        cache: where the result is kept.
        progress: called now and then with (records read, records in all).
        waiting: called if another process is reading the same source, before waiting for it.
    """
    total = len(records)
    part = None if total == len(source) else content_hash(records.tobytes())

    def read() -> pa.Table:
        batches = []
        done = 0
        each_rank_reads = source.stamp is None or cache.problem is not None
        processes = _processes(each_rank_reads) if source.can_fork and total >= MIN_PARALLEL else 1
        for batch in _read_all(source, records, processes):
            batches.append(batch)
            done += len(batch)
            if done < total:
                progress(done, total)
        table = index_table(batches)
        batches.clear()
        pa.default_memory_pool().release_unused()
        return table

    table = cache.table("records", source.stamp, (*source.settings, len(source), part), read, waiting)
    if total:
        progress(total, total)
    return RecordIndex(table)


def _read_all(source: Readable, records: Indices, processes: int) -> Iterator[pa.RecordBatch]:
    """Yield a batch of the index for each _CHUNK records, in order."""
    chunks = [records[start : start + _CHUNK] for start in range(0, len(records), _CHUNK)]
    if processes == 1:
        yield from (_read_records(source, chunk) for chunk in chunks)
        return
    # Forked, the processes have the source already; one that dies raises here instead of leaving this one waiting.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _set_source, (source,)) as pool:
        try:
            yield from pool.map(_read_forked, chunks)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _processes(each_rank_reads: bool) -> int:
    """Return how many processes may read: this job's cores, shared with the other ranks if each reads for itself."""
    if not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        return 1
    cores = len(os.sched_getaffinity(0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if each_rank_reads else 1
    return max(1, min(cores // max(ranks, 1), _MAX_PROCESSES))


_forked: Readable | None = None


def _set_source(source: Readable) -> None:
    global _forked
    _forked = source


def _read_forked(records: Indices) -> pa.RecordBatch:
    assert _forked is not None
    return _read_records(_forked, records)


def _read_records(source: Readable, records: Indices) -> pa.RecordBatch:
    """Read a few records, into a row each."""
    rows = []
    for record in records.tolist():
        try:
            with one_record(""):
                rows.append(_row(record, source.pair(record)))
        except RecordError as error:
            rows.append(Row(record, words=0, prompt=0, fault=encode_fault(error)))
    return index_batch(rows)


def _row(record: int, pair: PreferencePair) -> Row:
    texts = [message.text for message in pair.prompt]
    media = [Medium.of(image) for image in pair.images]
    media += [Medium.of(video, "video") for video in pair.videos]
    prompt = stable_hash("text:" + "\n".join(texts))
    return Row(record, words_hash(" ".join(texts)), prompt, media, encode_keys(unread_keys(pair)))
