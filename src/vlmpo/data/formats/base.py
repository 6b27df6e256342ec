"""What a parser is told of a record beside the record itself."""

from __future__ import annotations

from dataclasses import dataclass

from vlmpo.errors import RecordError


@dataclass(frozen=True, slots=True)
class RecordContext:
    """Where a record stands and what is asked of it.

    Attributes:
        origin: ``file:line`` of the record, for messages.
        source: name of its data set.
        image_root: folder that relative paths of images and videos are below; "": the working directory.
        max_tiles: tiles per pair its data set allows; None leaves it to the recipe.
        need_rejected: False in supervised fine-tuning: the rejected response is not looked at.
    """

    origin: str
    source: str = "data"
    image_root: str = ""
    max_tiles: int | None = None
    need_rejected: bool = True

    def error(self, reason: str, detail: str) -> RecordError:
        """The error that ``detail`` is wrong with this record, to be raised."""
        return RecordError(reason, self.origin, detail)
