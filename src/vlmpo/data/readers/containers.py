"""What records lie in: one way to open a JSON file, a table or a data set of the Hub, and to read its records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from vlmpo.data.formats.detect import HEAD
from vlmpo.data.index.store import Cache, Stamp
from vlmpo.data.readers.arrow import load_named, open_parquet, open_saved
from vlmpo.data.readers.json import JsonRecords
from vlmpo.data.readers.spec import FileSpec
from vlmpo.errors import RecordError


class Records(Protocol):
    """Records by index. Picklable; each process opens the files for itself.

    Attributes:
        kind: what people call the container.
    """

    kind: str

    @property
    def paths(self) -> list[str]:
        """The files behind the records."""

    @property
    def stamp(self) -> Stamp | None:
        """These files, in the state in which they were opened; None where nothing is to be kept of them."""

    def __len__(self) -> int: ...

    def origin(self, index: int) -> str:
        """``file:line`` of record ``index``, or what comes nearest, without reading it."""

    def record(self, index: int) -> Mapping[str, Any]:
        """Record ``index``. Raises RecordError ``bad_json``."""


def open_records(spec: FileSpec, cache: Cache) -> Records:
    """Opens what a FileSpec names; the cache may know where its records lie.

    Raises DataError where it cannot be read.
    """
    if spec.kind == "parquet":
        return open_parquet(spec.files)
    if spec.kind == "saved":
        return open_saved(spec.path, spec.split)
    if spec.kind in ("folder", "hub"):
        return load_named(spec.path, spec.subset, spec.split, is_folder=spec.kind == "folder")
    return JsonRecords(spec.path, is_array=spec.kind == "array", cache=cache)


def head(records: Records) -> list[Mapping[str, Any]]:
    """Its first few records, those left out that cannot be read."""
    found = []
    for index in range(min(HEAD, len(records))):
        try:
            found.append(records.record(index))
        except RecordError:
            continue
    return found
