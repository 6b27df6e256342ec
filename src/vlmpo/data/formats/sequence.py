"""Read pairs from any sequence of records, such as a ``datasets.Dataset`` or a list of dicts given to a trainer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmpo.data.formats.arrays import plain
from vlmpo.data.formats.base import Format, RecordContext
from vlmpo.data.formats.detect import AUTO, HEAD, recognise
from vlmpo.data.readers.arrow import raw_rows
from vlmpo.data.records import PreferencePair, one_record
from vlmpo.errors import DataError, RecordError

_REMEDY = "pass a datasets.Dataset, a DataFrame, or a list of dicts or of PreferencePairs"


@dataclass(frozen=True)
class RecordPairs:
    """Parses records of one format on access. Made by :func:`as_pairs`, with its arguments; picklable if they are."""

    records: Any
    format: Format
    need_rejected: bool
    name: str
    source_name: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> PreferencePair:
        """Read pair ``index``. Raises RecordError, ``bad_json`` if the item is not a record at all."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.pair(plain(self.records[index]), self.origin(index))

    def pair(self, item: Any, origin: str) -> PreferencePair:
        """Parse one item; messages call it ``origin``. Raises as :meth:`__getitem__`."""
        if isinstance(item, PreferencePair):
            return item
        if not isinstance(item, Mapping):
            raise RecordError("bad_json", origin, f"must be a mapping of keys or a PreferencePair, not {item!r:.60}")
        context = RecordContext(origin, self.source_name, need_rejected=self.need_rejected)
        with one_record(origin):
            return self.format.parse(item, context)

    def origin(self, index: int) -> str:
        """Return e.g. ``train_dataset[17]``, without reading it."""
        return f"{self.name}[{range(len(self))[index]}]"

    def source(self, index: int) -> str:
        """Return the name of the data set that pair ``index`` is counted under, without reading it."""
        return self.source_name


def as_pairs(
    dataset: Any,
    *,
    need_rejected: bool = True,
    name: str = "train_dataset",
    source: str = "data",
    format: str = AUTO,
) -> Any:
    """Return ``dataset`` with PreferencePairs as its items.

    A data set of PreferencePairs, e.g. a PairDataset, is returned as it is. For others the format is judged by the
    first few items. Images of a ``datasets.Dataset`` stay encoded until they are needed, whatever its format; if it has
    a transform of its own, its result is read.

    Args:
        dataset: a ``datasets.Dataset``, a pandas ``DataFrame``, a list of dicts, or anything with ``len()`` and
            ``[i]``. Images in it may be 8-bit arrays.
        need_rejected: False for supervised fine-tuning, which does not look at ``rejected``.
        name: what messages call the data set.
        source: name that its pairs are counted under.
        format: name of the format; by default it is judged by the items.

    Raises:
        DataError: it has no length or no items by number, its first items are no records or fit no format, or they hold
            images as arrays that are not of 8 bits.
    """
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(str, dataset))
        raise DataError(f"{name}: holds several data sets ({splits}); pass one of them, e.g. dataset['train']")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name}: {type(dataset).__name__} has no length and no items by number; load it without streaming"
        )
    rows = frame_rows(raw_rows(dataset))
    head: list[Mapping[str, Any]] = []
    for index in range(min(HEAD, len(rows))):
        try:
            item = rows[index]
        except RecordError:
            return dataset  # it reports its own bad records
        except (KeyError, TypeError) as error:
            raise DataError(f"{name}: {type(dataset).__name__} has no items by number; {_REMEDY}") from error
        if isinstance(item, PreferencePair):
            if not head:
                return dataset
            break
        if isinstance(item, Mapping):
            head.append(plain(item))
    if not len(rows):
        return dataset
    if not head:
        raise DataError(f"{name}: its first items are of type {type(rows[0]).__name__}; {_REMEDY}")
    pairs = RecordPairs(
        rows, recognise(head, format, name, need_rejected=need_rejected).format, need_rejected, name, source
    )
    for index, item in enumerate(head):
        try:
            pairs.pair(item, pairs.origin(index))
        except RecordError as error:
            if error.reason == "array_image":  # a matter of how the data set was made, not of one record
                raise DataError(str(error)) from error
    return pairs


def frame_rows(dataset: Any) -> Any:
    """Return the rows of a pandas ``DataFrame`` as dicts; anything else as it is."""
    pandas = sys.modules.get("pandas")  # who holds one has imported it
    if pandas is None or not isinstance(dataset, pandas.DataFrame):
        return dataset
    return dataset.astype(object).where(dataset.notna(), None).to_dict("records")
