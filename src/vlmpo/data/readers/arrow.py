"""Records in Arrow tables, through ``datasets``: Parquet files, saved folders, Hub names. Memory-mapped, undecoded.

Images stay the bytes they are stored as; the encoder opens them. A row's origin is ``file.parquet:row 17``, counted
from 0 as every library of tables counts.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from vlmpo.data.index.store import Stamp
from vlmpo.errors import DataError

_Found = TypeVar("_Found")


class TableRecords:
    """The rows of a ``datasets.Dataset`` as records.

    Args:
        dataset: the rows.
        kind: what people call the container.
        parts: (label, rows) of each file the rows are from, in order; the labels begin the rows' origins.
        paths: the files behind the rows.

    Attributes:
        stamp: these files, in the state in which they were opened.
    """

    def __init__(self, dataset: Any, kind: str, parts: Sequence[tuple[str, int]], paths: Sequence[str]) -> None:
        self.kind = kind
        self.paths = list(paths)
        self.stamp = Stamp.of(self.paths)
        self._rows = RawRows(dataset)
        self._labels = [label for label, _ in parts]
        self._bounds = np.cumsum([0, *(rows for _, rows in parts)])  # [parts + 1]: rows before each part

    def __len__(self) -> int:
        return len(self._rows)

    def origin(self, index: int) -> str:
        """``file.parquet:row 17`` of record ``index``; the row counts within its file."""
        part = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return f"{self._labels[part]}:row {index - int(self._bounds[part])}"

    def record(self, index: int) -> dict[str, Any]:
        """Record ``index``."""
        return self._rows[index]


class RawRows:
    """Rows of a ``datasets.Dataset`` as plain values, images, videos and sounds as ``{bytes, path}``."""

    def __init__(self, dataset: Any) -> None:
        self._table = dataset.with_format("arrow")
        features = copy.copy(dataset.features)
        self._features = type(features)({name: undecoded(feature) for name, feature in features.items()})

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table[index].to_pylist()[0]
        return self._features.decode_example(row)


def raw_rows(dataset: Any) -> Any:
    """``dataset`` with its rows as they are stored where it is a ``datasets.Dataset`` without a format of its own."""
    library = sys.modules.get("datasets")  # who holds one has imported it
    if library is None or not isinstance(dataset, library.Dataset) or dataset.format["type"] is not None:
        return dataset
    return RawRows(dataset)


def undecoded(feature: Any) -> Any:
    """A feature of ``datasets``, nested ones too, that leaves images, videos and sounds encoded."""
    if isinstance(feature, dict):
        return {name: undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list | tuple):
        return [undecoded(inner) for inner in feature]
    changed = copy.copy(feature)
    if hasattr(feature, "feature"):
        changed.feature = undecoded(feature.feature)
    # Json is text as stored, and a value for whoever reads it: that one is decoded.
    elif hasattr(feature, "decode") and type(feature).__name__ != "Json":
        changed.decode = False
    return changed


def open_parquet(files: Sequence[str]) -> TableRecords:
    """The rows of Parquet files, one after the other.

    ``datasets`` writes them into its cache once, as Arrow files that are mapped into memory.
    """
    import datasets
    from pyarrow import parquet

    where = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    parts = _or_data_error(where, lambda: [(file, parquet.read_metadata(file).num_rows) for file in files])
    kind = "Parquet" if len(files) == 1 else f"Parquet, {len(files)} files"
    filled = [file for file, rows in parts if rows]
    if not filled:
        return TableRecords(datasets.Dataset.from_dict({}), kind, parts, files)
    return TableRecords(_or_data_error(where, lambda: datasets.Dataset.from_parquet(filled)), kind, parts, files)


def open_saved(folder: str, split: str | None) -> TableRecords:
    """A folder that ``save_to_disk`` wrote; of a DatasetDict its ``split``, which may be left out where it has one."""
    import datasets

    found = _or_data_error(folder, lambda: datasets.load_from_disk(folder))
    if isinstance(found, datasets.DatasetDict):
        split = _one_split(split, list(found), folder)
        found = found[split]
    elif split is not None:
        raise DataError(f"{folder}: split: {split!r} is asked for, but one data set is saved here, without splits")
    label, kind = (
        (folder, "saved datasets folder")
        if split is None
        else (f"{folder}[{split}]", _split_kind("saved datasets folder", split))
    )
    return TableRecords(found, kind, [(label, len(found))], [file["filename"] for file in found.cache_files])


def load_named(name: str, subset: str | None, split: str | None, is_folder: bool) -> TableRecords:
    """A Hub name, or a folder laid out as a data set of the Hub is: what ``datasets.load_dataset`` takes."""
    import datasets

    what = "folder" if is_folder else "Hub data set"
    where = name
    if not is_folder:
        where = f"{name}: neither a file nor a folder here ({os.path.abspath(name)}), and as a data set of the Hub"
    if split is None:
        known = _or_data_error(where, lambda: datasets.get_dataset_split_names(name, subset))
        split = _one_split(None, known, name)
    found = _or_data_error(where, lambda: datasets.load_dataset(name, subset, split=split))
    label = f"{name}{f'/{subset}' if subset and not is_folder else ''}[{split}]"
    kind = _split_kind(what if subset is None else f"{what}, subset {subset}", split)
    return TableRecords(found, kind, [(label, len(found))], [file["filename"] for file in found.cache_files])


def _split_kind(kind: str, split: str) -> str:
    return f"{kind}, split {split}"


def _one_split(asked: str | None, known: Sequence[str], where: str) -> str:
    if asked is None and len(known) == 1:
        return known[0]
    if asked not in known:
        what = "name one under `split`" if asked is None else f"split: there is no {asked!r}"
        raise DataError(f"{where}: {what}; its splits are {', '.join(known) or 'none'}")
    return str(asked)


def _or_data_error(where: str, action: Callable[[], _Found]) -> _Found:
    """What ``action`` gives; what it raises, in one DataError: the libraries below it raise all kinds."""
    try:
        return action()
    except (MemoryError, DataError):
        raise
    except Exception as error:
        cause = error
        while isinstance(cause.__cause__, Exception):  # `datasets` says on top that it could not, below why
            cause = cause.__cause__
        detail = " ".join(str(cause).split())[:300]
        raise DataError(f"{where}: cannot be read ({type(cause).__name__}: {detail})") from error
