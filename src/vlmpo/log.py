"""What the package says: messages on stderr from the first rank, tables and progress bars for the commands."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from tqdm.auto import tqdm

_LOG_EVERY = 30.0  # seconds


class _FirstRank(logging.Filter):
    """Lets messages of the first rank through."""

    def filter(self, record: logging.LogRecord) -> bool:
        return os.environ.get("RANK", "0") == "0"


class _AboveProgressBars(logging.Handler):
    """Writes a message on stderr, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _make_logger() -> logging.Logger:
    made = logging.getLogger("vlmpo")
    if not made.handlers:
        made.addFilter(_FirstRank())
        made.addHandler(_AboveProgressBars())
        made.setLevel(logging.INFO)
        made.propagate = False  # a root handler of the application would say everything twice
    return made


logger = _make_logger()


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print plain text: no markup in it is read, and no long line is wrapped."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_table(console: Console, title: str, rows: Sequence[Sequence[object]]) -> None:
    """Print rows, the first of them the header, in aligned columns that are never wrapped or cut."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    print_line(console, f"\n{title}", style="bold")
    for name, *numbers in rows:
        cells = [f"{cell!s:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)]
        print_line(console, "  ".join([f"  {name!s:<{widths[0]}}", *cells]))


class Progress:
    """Counts up to ``total`` on stderr: a bar with rate and time left on a terminal, a line now and then in a log.

    Use it in a ``with`` statement.
    """

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._console = Console(stderr=True)
        self._done = 0
        self._started = self._logged = time.monotonic()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, rate="")

    def __enter__(self) -> Progress:
        self._started = self._logged = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """Count ``count`` more as done."""
        now = time.monotonic()
        self._done += count
        rate = self._done / max(now - self._started, 1e-9)
        self._bar.update(self._task, advance=count, rate=f"{rate:.1f} {self._unit}/s")
        if not self._console.is_terminal and now - self._logged >= _LOG_EVERY:
            self._logged = now
            left = (self._total - self._done) / rate
            self.notice(f"{self._title}: {self._done}/{self._total}, {rate:.1f} {self._unit}/s, {left:.0f} s left")

    def notice(self, text: str) -> None:
        """Print one line above the bar."""
        print_line(self._console, text)
