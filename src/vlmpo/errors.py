"""Errors that users can fix: each is a VlmpoError and a standard exception too.

A message says what was wrong, where (recipe key, or file:line of the record) and what to do. The command line
prints it without a traceback and exits with 2.
"""

from __future__ import annotations

from collections.abc import Iterable


class VlmpoError(Exception):
    """Base class of all errors that the user can fix.

    Attributes:
        met_by: which ranks of a distributed run raise it, so that it is printed once: every rank of a ``node`` (a file,
            an argument), one ``rank`` (a record), or ``all`` ranks (one rank sent it to the others).
    """

    met_by = "node"


class RecipeError(VlmpoError, ValueError):
    """A recipe, an override or an argument is wrong."""


class DataError(VlmpoError, ValueError):
    """A data set cannot be read: a missing annotation file, a malformed meta.json, an unknown format."""


class FileChangedError(DataError):
    """A data file is not the one any more that was opened: what is known of its records does not hold."""


class RecordError(VlmpoError, ValueError):
    """One record cannot be used.

    Args:
        reason: short name under which a skipped record is counted, e.g. ``missing_image``.
        origin: ``file:line`` of the record, or "" if it has none.
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
    """The model or its processor cannot be used, e.g. a checkpoint with weights missing."""


class RunError(VlmpoError, RuntimeError):
    """A run folder or checkpoint cannot be used: nothing to resume from, a different reference model."""


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
