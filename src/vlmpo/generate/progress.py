"""How far a long stage has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_LOG_EVERY = 30.0  # seconds


class Progress:
    """Counts up to ``total`` on stderr, with rate and time left. Use it in a ``with`` statement."""

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
        """``count`` more are done."""
        now = time.monotonic()
        self._done += count
        rate = self._done / max(now - self._started, 1e-9)
        self._bar.update(self._task, advance=count, rate=f"{rate:.1f} {self._unit}/s")
        if not self._console.is_terminal and now - self._logged >= _LOG_EVERY:
            self._logged = now
            left = (self._total - self._done) / rate
            self.notice(f"{self._title}: {self._done}/{self._total}, {rate:.1f} {self._unit}/s, {left:.0f} s left")

    def notice(self, text: str) -> None:
        """One line, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
