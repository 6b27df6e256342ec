"""Find the records of one split in a file whose records say themselves, under ``split``, which they belong to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlmpo.data.index.columns import to_arrow, to_numpy
from vlmpo.data.index.store import Cache
from vlmpo.data.readers.arrow import SAVED_SPLITS, TableRecords
from vlmpo.data.readers.json import JsonRecords
from vlmpo.data.readers.spec import FileSpec
from vlmpo.errors import DataError, RecordError, shorten

_SHOWN = 8
_UNREADABLE = None


def records_to_use(records: JsonRecords | TableRecords, spec: FileSpec, cache: Cache) -> NDArray[np.int64]:
    """Return the numbers of the records that ``spec`` names, ascending: all, or those whose ``split`` is the spec's.

    A record that cannot be read belongs to every split, so that it is counted as bad.

    Raises:
        DataError: no record is of that split.
    """
    whole_saved = spec.kind == "saved" and not os.path.isfile(os.path.join(spec.path, SAVED_SPLITS))
    if spec.split is None or not (spec.kind in ("lines", "array", "parquet") or whole_saved):
        return np.arange(len(records), dtype=np.int64)  # the reader has chosen the split

    def find() -> pa.Table:
        splits = list(_splits(records))
        counts = Counter(splits)
        if spec.split not in counts:
            raise DataError(f"{spec.path}: split: {_no_such(str(spec.split), counts)}")
        found = [number for number, split in enumerate(splits) if split in (spec.split, _UNREADABLE)]
        return pa.table({"record": to_arrow(np.asarray(found, np.int64))})

    return to_numpy(cache.table("split", records.stamp, [spec.split], find)["record"])


def _splits(records: JsonRecords | TableRecords) -> Iterator[str | None]:
    """Yield the ``split`` of each record, "" if it has none."""
    if isinstance(records, TableRecords):
        yield from ("" if value is None else str(value) for value in records.column("split"))
        return
    for number in range(len(records)):
        try:
            value = records.record(number).get("split")
        except RecordError:
            yield _UNREADABLE
        else:
            yield "" if value is None else str(value)


def _no_such(split: str, counts: Counter[str | None]) -> str:
    there = [f"{shorten(name)} ({count})" for name, count in counts.most_common(_SHOWN) if name]
    if not there:
        remedy = f"leave out {split!r}, or keep a part back by data.hold_out"
        return f"has no effect on a file of which no record says its `split`; {remedy}"
    return f"no record is of {split!r}; there are {', '.join(there)}"
