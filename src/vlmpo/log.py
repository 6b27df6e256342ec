"""Output: the logger (stderr, first rank only); lines, tables, boxes and progress bars.

``VLMPO_LOG_LEVEL`` sets the logger's level: ``debug`` also shows what :mod:`vlmpo.quiet` holds back, ``warning`` only
warnings.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text
from tqdm.auto import tqdm

# Seconds: between two lines in a log, between two states of a bar, and before a transient bar is shown.
_LOG_EVERY = 30.0
_REDRAW_EVERY = 0.1
_DELAY = 3.0
WIDTH = 100  # columns that no line of a summary exceeds

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


# What moves (bars, the line of a training step) and what is logged share it, so that a line comes above, never within.
# A notebook has no terminal either: there everything is a plain line.
stderr = Console(stderr=True, force_jupyter=False)
_PROCESS = os.getpid()


def on_terminal(console: Console) -> bool:
    """Return whether ``console`` writes to a terminal that can move its cursor, also if colours are forced."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


class _AboveProgressBars(logging.Handler):
    """Writes to stderr, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        text = shown(self.format(record))
        if os.getpid() != _PROCESS:  # a forked reader of data must not draw the bar of the process it came from
            print(text, file=sys.__stderr__, flush=True)
            return
        with tqdm.external_write_mode(file=sys.stderr):  # the bars of libraries, e.g. of a download
            if on_terminal(stderr):
                text = "\n".join(line for given in text.split("\n") for line in wrapped(given, stderr.width))
            stderr.print(Text(text), highlight=False, soft_wrap=True)


def _level() -> int:
    name = os.environ.get("VLMPO_LOG_LEVEL", "info")
    level = logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        print(f"warning: VLMPO_LOG_LEVEL is no level: {shown(name)!r}; info is used", file=sys.stderr)
    return logging.INFO if level is None else level


logger = logging.getLogger("vlmpo")
if not logger.handlers:
    logger.addFilter(lambda record: os.environ.get("RANK", "0") == "0")  # only the first rank logs
    logger.addHandler(_AboveProgressBars())
    logger.setLevel(_level())
    logger.propagate = False  # a root handler of the application would repeat every message


def cell(text: object) -> str:
    """Return ``text`` as it is shown in one line, a newline in it as ``\\n``."""
    return shown(text).replace("\n", "\\n")


def fit(text: str, width: int) -> str:
    """Return ``text`` in at most ``width`` columns, its middle left out if need be: the ends of names tell them apart.

    ``text`` must have been through :func:`cell`.
    """
    if cell_len(text) <= width:
        return text
    head, tail = "", ""
    for at in range(1, len(text)):
        longer = (text[: len(head) + 1], tail) if at % 2 else (head, text[-len(tail) - 1 :])
        if sum(map(cell_len, longer)) >= width:
            break
        head, tail = longer
    return f"{head}…{tail}"


def wrapped(line: str, width: int) -> list[str]:
    """Return ``line`` in lines of at most ``width`` columns, broken at spaces; longer words, e.g. paths, stay whole."""
    if cell_len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False, drop_whitespace=True)


def line_width() -> int:
    """Return the most columns that a line of a summary has on stderr: on a terminal no more than that has."""
    return min(stderr.width - 1, WIDTH) if on_terminal(stderr) else WIDTH  # the last column makes some terminals wrap


def aligned(rows: Sequence[tuple[str, object]], width: int = WIDTH, *, fold: bool = True) -> list[str]:
    """Return ``label  value`` lines of at most ``width`` columns; what is left of a value stands below it.

    Args:
        rows: labels and values; an empty label goes on with the row before.
        width: in columns.
        fold: break a word that is too long for a line; False: it stands whole on a line of its own, and can be copied.
    """
    indent = max((len(label) for label, _ in rows), default=0) + 4
    room = max(width - indent, 10)
    lines = []
    for label, value in rows:
        text = cell(value)
        parts = [part.plain.rstrip() for part in Text(text).wrap(stderr, room)] if fold else wrapped(text, room)
        for number, part in enumerate(parts):
            lines.append(f"  {'' if number else label:<{indent - 2}}{part}".rstrip())
    return lines


def print_line(text: str | Text, style: str | None = None) -> None:
    """Print ``text`` on stdout: no markup is interpreted, no control character is sent, no long line is wrapped.

    A ``Text`` must have been through :func:`shown`.
    """
    line = text if isinstance(text, Text) else Text(shown(text))  # a Text is not searched for markup or emoji
    Console(force_jupyter=False).print(line, style=style, highlight=False, soft_wrap=True)


def print_error(heading: str, text: str) -> None:
    """Print an error on stderr, like :func:`print_line`."""
    line = Text.assemble((heading, "bold red"), shown(text))
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def print_table(title: str, rows: Sequence[Sequence[object]]) -> None:
    """Print ``rows`` (the first is the header) in aligned columns that are never wrapped.

    Nor is anything cut, but for names in the first column that make lines longer than a terminal is wide.
    """
    lines = [[cell(value) for value in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    console = Console(force_jupyter=False)
    if on_terminal(console):
        widths[0] = max(min(widths[0], console.width - 3 - sum(width + 2 for width in widths[1:])), 12)
    print_line(f"\n{title}", style="bold")
    for name, *numbers in lines:
        name = fit(name, widths[0])
        cells = [" " * (width - cell_len(text)) + text for text, width in zip(numbers, widths[1:], strict=True)]
        print_line("  ".join([f"  {name}{' ' * (widths[0] - cell_len(name))}", *cells]))


def print_box(title: str, rows: Sequence[tuple[str, object]]) -> None:
    """Print ``label  value`` rows on stdout: in a box on a terminal; else plainly, paths and commands whole."""
    console = Console(force_jupyter=False)
    if not on_terminal(console):
        print_line("\n".join(["", title, *aligned(rows, fold=False)]))
        return
    width = min(console.width, WIDTH)
    body = Text("\n".join(aligned(rows, width - 4)))
    console.print()
    console.print(Panel(body, title=shown(title), title_align="left", border_style="green", width=width))


def columns(text: str) -> int:
    """Return how many columns of a terminal ``text`` takes."""
    return cell_len(text)


class MovingLine:
    """Shows one line at the bottom of the terminal, below all that is logged, until it is closed.

    It starts no thread, so that a process may fork meanwhile.
    """

    def __init__(self) -> None:
        self._live = Live(console=stderr, auto_refresh=False, transient=True)
        self._live.start()
        self._last = 0.0

    @staticmethod
    def possible() -> bool:
        """Return whether stderr is a terminal, and this rank logs."""
        return on_terminal(stderr) and logger.isEnabledFor(logging.INFO)

    def is_due(self) -> bool:
        """Return whether the last line has stood long enough to be read."""
        return time.monotonic() - self._last >= _REDRAW_EVERY

    def show(self, text: str) -> None:
        """Show ``text``, which must have been through :func:`cell`, in the place of the line before."""
        self._last = time.monotonic()
        self._live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)

    def close(self) -> None:
        """Take the line away, and give the cursor back."""
        self._live.stop()


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
        self._console = stderr
        self._done = 0
        self._started = self._shown = time.monotonic()
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not on_terminal(stderr),
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
        due = now - self._shown >= (_REDRAW_EVERY if on_terminal(self._console) else _LOG_EVERY)
        if on_terminal(self._console):
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
