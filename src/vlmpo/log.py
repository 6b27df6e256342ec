"""Output: the logger (stderr, first rank only); lines, tables and progress bars for the commands."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text
from tqdm.auto import tqdm

# Seconds: between two lines in a log, between two states of a bar, and before a transient bar is shown.
_LOG_EVERY = 30.0
_REDRAW_EVERY = 0.1
_DELAY = 3.0

# What a terminal obeys, or what hides or reorders text: C0 and C1 but for tab and newline, invisible and bidirectional
# format characters, tags; and halves of surrogate pairs, which cannot be written at all.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)


def shown(text: object) -> str:
    """Return ``text`` with control characters written out: ESC as ``\\x1b``. All that comes from data passes here."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


class _AboveProgressBars(logging.Handler):
    """Writes to stderr, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(shown(self.format(record)), file=sys.stderr)


logger = logging.getLogger("vlmpo")
if not logger.handlers:
    logger.addFilter(lambda record: os.environ.get("RANK", "0") == "0")  # only the first rank logs
    logger.addHandler(_AboveProgressBars())
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a root handler of the application would repeat every message


def print_line(text: str | Text, style: str | None = None) -> None:
    """Print ``text`` on stdout: no markup is interpreted, no control character is sent, no long line is wrapped.

    A ``Text`` must have been through :func:`shown`.
    """
    line = text if isinstance(text, Text) else Text(shown(text))  # a Text is not searched for markup or emoji
    Console().print(line, style=style, highlight=False, soft_wrap=True)


def print_error(heading: str, text: str) -> None:
    """Print an error on stderr, like :func:`print_line`."""
    line = Text.assemble((heading, "bold red"), shown(text))
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def print_table(title: str, rows: Sequence[Sequence[object]]) -> None:
    """Print ``rows`` (the first is the header) in aligned columns that are never wrapped or cut."""
    lines = [[shown(cell).replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    print_line(f"\n{title}", style="bold")
    for name, *numbers in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)]
        print_line("  ".join([f"  {name:<{widths[0]}}", *cells]))


class Progress:
    """Shows on stderr how much is done: a bar on a terminal, a line every 30 seconds in a log.

    Use it in a ``with`` statement. It starts no thread, so that a process may fork meanwhile.

    Args:
        title: what is being done.
        total: how much there is to do; 0 if that is not known before the first :meth:`update`.
        unit: plural noun of what is counted.
        transient: show nothing in the first seconds, and remove the bar at the end.
    """

    def __init__(self, title: str, total: int, unit: str, *, transient: bool = False) -> None:
        self._title, self._total, self._unit, self._transient = title, total, unit, transient
        self._console = Console(stderr=True)
        self._done = 0
        self._started = self._shown = time.monotonic()
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=transient,
            auto_refresh=False,
        )
        self._task = self._bar.add_task(title, total=total, rate="")

    def __enter__(self) -> Progress:
        self._started = self._shown = time.monotonic()
        if not self._transient:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """Count ``count`` more as done."""
        self.update(self._done + count, self._total)

    def update(self, done: int, total: int) -> None:
        """Set how much is done, and of how much."""
        self._done, self._total = done, total
        now = time.monotonic()
        elapsed = now - self._started
        if self._transient and elapsed < _DELAY:
            return
        rate = done / max(elapsed, 1e-9)
        due = now - self._shown >= (_REDRAW_EVERY if self._console.is_terminal else _LOG_EVERY)
        if self._console.is_terminal:
            self._bar.start()  # no effect if it has started already
            speed = f"{rate:.1f} {self._unit}/s"
            self._bar.update(self._task, completed=done, total=total, rate=speed, refresh=due or done == total)
        elif due and done:
            left = (total - done) / rate
            self.notice(f"{self._title}: {done}/{total}, {rate:.1f} {self._unit}/s, {left:.0f} s left")
        if due:
            self._shown = now

    def notice(self, text: str) -> None:
        """Print one line above the bar."""
        self._console.print(Text(shown(text)), highlight=False, soft_wrap=True)
