"""Read records in Arrow tables, through ``datasets``: Parquet files, saved folders, Hub names. Memory-mapped.

Images stay encoded; the encoder opens them. A row's origin is ``file.parquet:row 17``, counted from 0.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from vlmpo.data.index.store import Stamp
from vlmpo.data.records import one_record
from vlmpo.errors import DataError, RecordError

# Of one row, with all that is embedded in it.
MAX_ROW_BYTES = 256 << 20
SAVED_SPLITS = "dataset_dict.json"  # in a folder that holds several saved data sets

_Result = TypeVar("_Result")


class TableRecords:
    """Reads the rows of a ``datasets.Dataset`` as records.

    Args:
        dataset: the rows.
        kind: what users call the container.
        parts: label and number of rows of each file, in order; a row's origin begins with the label.
        paths: the files behind the rows.

    Attributes:
        stamp: state of these files when they were opened.
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
        """Return ``file.parquet:row 17`` of record ``index``, counted within its file."""
        part = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return f"{self._labels[part]}:row {index - int(self._bounds[part])}"

    def column(self, name: str) -> list[Any]:
        """Return all values of a column; None for each row if there is no such column."""
        return self._rows.column(name)

    def record(self, index: int) -> dict[str, Any]:
        """Read record ``index``. Raises RecordError ``too_large``, or ``unreadable_record`` for broken content."""
        with one_record(self.origin(index)):
            row = self._rows.row(index)
            if row.nbytes > MAX_ROW_BYTES:
                detail = f"the row takes {row.nbytes / 1e6:.0f} MB, at most {MAX_ROW_BYTES >> 20} MiB are read"
                raise RecordError("too_large", self.origin(index), f"{detail}; save what is embedded as files")
            return self._rows.values(row)


class RawRows:
    """Reads rows of a ``datasets.Dataset`` as plain values; images, videos and sounds as ``{bytes, path}``."""

    def __init__(self, dataset: Any) -> None:
        columns = dataset.format["columns"]
        self._table = dataset.with_format("arrow", columns=columns)
        features = copy.copy(dataset.features)
        self._features = type(features)({name: undecoded(features[name]) for name in columns})

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.values(self.row(index))

    def column(self, name: str) -> list[Any]:
        """Return all values of a column; None for each row if there is no such column."""
        if name not in self._features:
            return [None] * len(self)
        return [value for batch in self._table.select_columns([name]).iter(4096) for value in batch[name].to_pylist()]

    def row(self, index: int) -> Any:
        """Return a row as an Arrow table, which copies nothing."""
        return self._table[index]

    def values(self, row: Any) -> dict[str, Any]:
        """Return a row as plain values."""
        return self._features.decode_example(row.to_pylist()[0])


def raw_rows(dataset: Any) -> Any:
    """Return the rows as they are stored, if ``dataset`` is a ``datasets.Dataset`` without a transform of its own.

    Its format (``torch``, ``numpy``, ...) would only hold the same values in other types.
    """
    library = sys.modules.get("datasets")  # who holds one has imported it
    if library is None or not isinstance(dataset, library.Dataset) or dataset.format["type"] == "custom":
        return dataset
    return RawRows(dataset)


def undecoded(feature: Any) -> Any:
    """Return a feature of ``datasets``, perhaps nested, that leaves images, videos and sounds encoded."""
    if isinstance(feature, dict):
        return {name: undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list | tuple):
        return [undecoded(inner) for inner in feature]
    changed = copy.copy(feature)
    if hasattr(feature, "feature"):
        changed.feature = undecoded(feature.feature)
    # Json is stored as text; it is the one kind to decode.
    elif hasattr(feature, "decode") and type(feature).__name__ != "Json":
        changed.decode = False
    return changed


def open_parquet(files: Sequence[str]) -> TableRecords:
    """Open Parquet files as one sequence of rows. ``datasets`` converts them once, into Arrow files in its cache."""
    import datasets
    from pyarrow import parquet

    where = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    parts = _or_data_error(where, lambda: [(file, parquet.read_metadata(file).num_rows) for file in files])
    kind = "Parquet" if len(files) == 1 else f"Parquet, {len(files)} files"
    filled = [file for file, rows in parts if rows]
    empty = datasets.Dataset.from_dict({})
    rows = _or_data_error(where, lambda: datasets.Dataset.from_parquet(filled)) if filled else empty
    return TableRecords(rows, kind, parts, files)


def open_saved(folder: str, split: str | None) -> TableRecords:
    """Open a folder that ``save_to_disk`` wrote, or one split of it. ``split`` may be left out if there is only one."""
    import datasets

    saved = _or_data_error(folder, lambda: datasets.load_from_disk(folder))
    label, kind = folder, "saved datasets folder"
    if isinstance(saved, datasets.DatasetDict):
        split = _choose_split(split, list(saved), folder)
        saved, label, kind = saved[split], f"{folder}[{split}]", f"{kind}, split {split}"
    elif split is not None and "split" not in saved.column_names:  # whose rows name it: vlmpo.data.readers.split
        raise DataError(f"{folder}: split: one data set without splits is saved here; leave out {split!r}")
    return TableRecords(saved, kind, [(label, len(saved))], [file["filename"] for file in saved.cache_files])


def load_named(
    name: str, subset: str | None, split: str | None, is_folder: bool, files_in: str | None = None
) -> TableRecords:
    """Load a Hub name, or a folder laid out as a data set of the Hub, by ``datasets.load_dataset``.

    Of a Hub name, ``files_in`` names the folder of its files.
    """
    import datasets

    where = name
    if not is_folder:
        where = f"{name}: neither a file nor a folder here ({os.path.abspath(name)}), and as a data set of the Hub"
    more = {} if files_in is None else {"data_dir": files_in}
    if split is None:
        splits = _or_data_error(where, lambda: datasets.get_dataset_split_names(name, subset, **more))
        split = _choose_split(None, splits, name)
    rows = _or_data_error(where, lambda: datasets.load_dataset(name, subset, split=split, **more))
    label = f"{name}{f'/{subset}' if subset and not is_folder else ''}[{split}]"
    container = "folder" if is_folder else "Hub data set"
    kind = f"{container}{'' if subset is None else f', subset {subset}'}, split {split}"
    return TableRecords(rows, kind, [(label, len(rows))], [file["filename"] for file in rows.cache_files])


def download_folders() -> tuple[str, ...]:
    """Return the folders into which ``datasets`` downloads: where the files of a Hub data set are."""
    from datasets import config
    from huggingface_hub import constants

    return str(config.DOWNLOADED_DATASETS_PATH), str(config.EXTRACTED_DATASETS_PATH), constants.HF_HUB_CACHE


def _choose_split(split: str | None, known: Sequence[str], where: str) -> str:
    if split is None and len(known) == 1:
        return known[0]
    if split is None or split not in known:
        what = "name one under `split`" if split is None else f"split: there is no {split!r}"
        raise DataError(f"{where}: {what}; its splits are {', '.join(known) or 'none'}")
    return split


def _or_data_error(where: str, action: Callable[[], _Result]) -> _Result:
    """Return the result of ``action``. Raises DataError for whatever kind of error a library raises in it."""
    try:
        return action()
    except (MemoryError, DataError):
        raise
    except Exception as error:
        cause = error
        while isinstance(cause.__cause__, Exception):  # the outer errors of `datasets` name no cause
            cause = cause.__cause__
        detail = " ".join(str(cause).split())[:300]
        raise DataError(f"{where}: cannot be read ({type(cause).__name__}: {detail})") from error
