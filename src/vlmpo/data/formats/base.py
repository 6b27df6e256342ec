"""Define a format of records, and the context in which a record is parsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmpo.data.records import PreferencePair
from vlmpo.errors import RecordError


@dataclass(frozen=True, slots=True)
class RecordContext:
    """Describes where a record comes from and how it is to be read.

    Attributes:
        origin: ``file:line`` of the record, for messages.
        source: name of its data set.
        image_root: folder that relative paths of images and videos are below; "" is the working directory.
        max_tiles: tiles per pair its data set allows; None leaves it to the recipe.
        need_rejected: False in supervised fine-tuning, which does not look at the rejected response.
    """

    origin: str
    source: str = "data"
    image_root: str = ""
    max_tiles: int | None = None
    need_rejected: bool = True

    def error(self, reason: str, detail: str) -> RecordError:
        """Return an error that names this record, to be raised."""
        return RecordError(reason, self.origin, detail)


@dataclass(frozen=True, slots=True)
class Format:
    """Describes a format of records.

    Attributes:
        name: name in a recipe's ``format``.
        title: name that users know it by.
        keys: what its records hold, for messages.
        parse: turns one record into a pair; raises RecordError.
    """

    name: str
    title: str
    keys: str
    parse: Callable[[Mapping[str, Any], RecordContext], PreferencePair]
