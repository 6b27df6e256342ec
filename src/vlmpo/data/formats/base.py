"""Define a format of records, and the context in which a record is parsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmpo.data.records import PreferencePair
from vlmpo.errors import RecordError


@dataclass(frozen=True)
class PathRules:
    """Says which paths of images and videos leave the image root of a data set and are taken nevertheless.

    Attributes:
        within: folder that relative paths may not leave; None: the image root.
        absolute_in: folders in which absolute paths may be, beside the image root; None: anywhere.
        confine: refuse whatever leaves the image root, a link out of it too.
    """

    within: str | None = None
    absolute_in: tuple[str, ...] | None = None
    confine: bool = False


_ANY_ABSOLUTE = PathRules()


@dataclass(frozen=True, slots=True)
class RecordContext:
    """Describes where a record comes from and how it is to be read.

    Attributes:
        origin: ``file:line`` of the record, for messages.
        source: name of its data set.
        image_root: folder that relative paths of images and videos are below; "" is the working directory.
        max_tiles: tiles per pair its data set allows; None leaves it to the recipe.
        need_rejected: False in supervised fine-tuning, which does not look at the rejected response.
        paths: which paths may leave ``image_root``.
        forms: in which forms the images and videos read so far are given; see :mod:`vlmpo.data.formats.paths`.
    """

    origin: str
    source: str = "data"
    image_root: str = ""
    max_tiles: int | None = None
    need_rejected: bool = True
    paths: PathRules = _ANY_ABSOLUTE
    forms: set[str] = field(default_factory=set, compare=False)

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
        is_ranking: whether records can hold a rejected response; others are for fine-tuning alone.
    """

    name: str
    title: str
    keys: str
    parse: Callable[[Mapping[str, Any], RecordContext], PreferencePair]
    is_ranking: bool = True
