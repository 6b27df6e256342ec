"""Errors that users can fix: each is a VlmpoError and a standard exception too.

A message says what was wrong, where (recipe key, or file:line of the record) and what to do. The command line
prints it without a traceback and exits with 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping


class VlmpoError(Exception):
    """Base class of all errors that the user can fix.

    Attributes:
        met_by: which ranks of a distributed run raise it, so that it is printed once: every rank of a ``node`` (a file,
            an argument), one ``rank`` (a record), or ``all`` ranks (one rank sent it to the others).
    """

    met_by = "node"


def met_by_all(error: VlmpoError) -> VlmpoError:
    """Mark an error that all ranks raise, so that it is printed once; return it."""
    error.met_by = "all"
    return error


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
        return printable(f"{where}{self.detail} [{self.reason}]")


class ModelError(VlmpoError, ValueError):
    """The model or its processor cannot be used, e.g. a checkpoint with weights missing."""


class RunError(VlmpoError, RuntimeError):
    """A run folder or checkpoint cannot be used: nothing to resume from, a different reference model."""


def shorten(value: object, limit: int = 80) -> str:
    """Return a value as a message shows it: on one line, its middle left out above ``limit`` characters."""
    text = str(value)
    if len(text) > limit:
        head = (limit - 3) // 2
        text = f"{text[:head]}...{text[head + 3 - limit :]}"
    return text.replace("\n", " ")


def printable(text: str) -> str:
    """Return ``text`` with half surrogate pairs, which JSON and paths may hold, as escapes: they cannot be printed."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shorten_path(path: str) -> str:
    """Return a path as a message shows it: the folder that exists whole, what is below it as :func:`shorten` does."""
    if len(path) <= 80:
        return path
    folder, rest = os.path.split(path)
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        if not name:
            return shorten(path)
        rest = os.path.join(name, rest)
    return os.path.join(folder, shorten(rest))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_records(examples: Mapping[str, Iterable[str]], count: int = 3) -> str:
    """Join the first ``count`` messages of ``examples`` by reason, and the first of each other reason, a line each."""
    shown: dict[str, str] = {}  # message: reason
    for reason, messages in examples.items():
        for message in messages:
            if len(shown) < count or reason not in shown.values():
                shown[message] = reason
    return "\n  ".join(shown)


def examples_by_reason(errors: Iterable[RecordError], count: int = 3) -> dict[str, list[str]]:
    """Return the first ``count`` messages under each reason, reasons in order of appearance."""
    examples: dict[str, list[str]] = {}
    for error in errors:
        messages = examples.setdefault(error.reason, [])
        if len(messages) < count:
            messages.append(str(error))
    return examples
