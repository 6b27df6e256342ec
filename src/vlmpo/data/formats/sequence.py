"""Read pairs from any sequence of records, such as a ``datasets.Dataset`` or a list of dicts given to a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmpo.data.formats.base import Format, RecordContext
from vlmpo.data.formats.detect import AUTO, HEAD, recognise
from vlmpo.data.readers.arrow import raw_rows
from vlmpo.data.records import PreferencePair
from vlmpo.errors import DataError, RecordError


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
        item = self.records[index]
        if isinstance(item, PreferencePair):
            return item
        origin = self.origin(index)
        if not isinstance(item, Mapping):
            raise RecordError("bad_json", origin, f"must be a mapping of keys or a PreferencePair, not {item!r:.60}")
        context = RecordContext(origin, self.source_name, need_rejected=self.need_rejected)
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
    first few items. Images of a ``datasets.Dataset`` stay encoded until they are needed, unless it has a format or
    transform of its own: then its result is read.

    Args:
        dataset: a ``datasets.Dataset``, a list of dicts, or anything with ``len()`` and ``[i]``.
        need_rejected: False for supervised fine-tuning, which does not look at ``rejected``.
        name: what messages call the data set.
        source: name that its pairs are counted under.
        format: name of the format; by default it is judged by the items.

    Raises:
        DataError: it has no length or no items by number, or its first items fit no format.
    """
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(str, dataset))
        raise DataError(f"{name}: holds several data sets ({splits}); pass one of them, e.g. dataset['train']")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name}: {type(dataset).__name__} has no length and no items by number; load it without streaming"
        )
    rows = raw_rows(dataset)
    head: list[Mapping[str, Any]] = []
    for index in range(min(HEAD, len(rows))):
        try:
            item = rows[index]
        except RecordError:
            return dataset  # it reports its own bad records
        if isinstance(item, PreferencePair):
            if not head:
                return dataset
            break
        if isinstance(item, Mapping):
            head.append(item)
    if not len(rows):
        return dataset
    return RecordPairs(rows, recognise(head, format, name).format, need_rejected, name, source)
