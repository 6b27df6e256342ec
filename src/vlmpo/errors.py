"""What can go wrong through no fault of vlmpo's: each kind is a VlmpoError and a standard exception too.

A message says what was wrong, where (recipe key, or file:line of the record) and what to do. The command line
prints it without a traceback and exits with 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class VlmpoError(Exception):
    """Base of every error that is the user's to mend.

    Attributes:
        met_by: who raises it in a distributed run, so that it is said once: the ranks of a ``node`` alike (a file, an
            argument), one ``rank`` alone (a record), or ``all`` of them (what one met and told the others).
    """

    met_by = "node"


class RecipeError(VlmpoError, ValueError):
    """A recipe, an override or an argument is at fault; the message names the key and the remedy."""


class DataError(VlmpoError, ValueError):
    """A data set as a whole is at fault: a missing annotation file, a malformed meta.json, an unknown format."""


class RecordError(VlmpoError, ValueError):
    """One record is at fault.

    Args:
        reason: short name under which the record is counted when bad records are skipped, e.g. ``missing_image``.
        origin: ``file:line`` of the record, or "" where there is none.
        detail: what was wrong and what to do, in one sentence.
    """

    met_by = "rank"

    def __init__(self, reason: str, origin: str, detail: str) -> None:
        self.reason = reason
        self.origin = origin
        self.detail = detail
        super().__init__(reason, origin, detail)

    def __str__(self) -> str:
        where = f"{self.origin}: " if self.origin else ""
        return f"{where}{self.detail} [{self.reason}]"


class ModelError(VlmpoError, ValueError):
    """The model or its processor cannot be used as asked, e.g. a checkpoint that does not load whole."""


class RunError(VlmpoError, RuntimeError):
    """A run folder or checkpoint cannot be used as asked: nothing to resume from, another reference than before."""


@contextmanager
def alike_on_a_node() -> Iterator[None]:
    """Around work that every rank does alike, on the files of its node: all of them meet a bad record there."""
    try:
        yield
    except RecordError as error:
        error.met_by = "node"
        raise


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def examples_by_reason(errors: Iterable[RecordError], count: int = 3) -> dict[str, list[str]]:
    """Return the first ``count`` messages under each reason, reasons in order of appearance."""
    examples: dict[str, list[str]] = {}
    for error in errors:
        messages = examples.setdefault(error.reason, [])
        if len(messages) < count:
            messages.append(str(error))
    return examples
