"""``vlmpo report``: an HTML page on one or several runs; and the same page at the end of a command, and meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vlmpo.errors import RunError, first_line
from vlmpo.fileio import writing
from vlmpo.interrupt import Interrupted
from vlmpo.log import logger, print_line
from vlmpo.report.write import PICTURE_FILE, REPORT_FILE, write_report

SHARE_OF_TIME = 0.02  # of a run's, for scoring pairs again
_EVERY = 180.0  # seconds between two reports of a run that is under way


def report(runs: Sequence[Path], output: Path | None = None) -> None:
    """Write the report of ``runs``, drawn over one another if there are several.

    Args:
        runs: run folders, evaluation folders or demo folders.
        output: the folder to write into; None: the run's own, or that which holds all runs.

    Raises:
        RunError: a folder holds nothing to report on, the output is named like a file, or the disk is full, read-only
            or gone.
    """
    if output is not None and output.suffix in (".html", ".png"):
        raise RunError(
            f"--output is a folder, which gets {REPORT_FILE} and {PICTURE_FILE}; {output} is named like a file"
        )
    if output is None:
        output = runs[0] if len(runs) == 1 else Path(os.path.commonpath([run.resolve().parent for run in runs]))
    with writing(output):
        files = write_report(runs, output)
    print_line(f"report: {', '.join(map(str, files))}")


class ReportRefresh(TrainerCallback):
    """Writes the report of a run that is under way every few minutes, curves only.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last = time.monotonic()
        self._works = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not (self._works and state.is_world_process_zero) or time.monotonic() - self._last < _EVERY:
            return
        self._works = try_report(self._folder, curves_only=True, with_picture=False)  # a failure is said once
        self._last = time.monotonic()


@contextmanager
def report_at_end(folder: Path, *, ranks: int = 1, say_where: bool = True) -> Iterator[None]:
    """Write the report of the run in ``folder`` however the body ends; on one rank only.

    After a signal there is little time, and with several ranks a launcher waits for none: the picture is then left out.
    """
    try:
        yield
    except Interrupted as stop:
        if stop.step is not None:
            try_report(folder, with_picture=ranks == 1)
        raise
    except Exception:
        with suppress(Exception):  # what ended the run matters more, e.g. that the disk is full
            write_report([folder], folder)
        raise
    else:
        if say_where:
            report_done(folder)
        else:
            try_report(folder)


def report_done(folder: Path) -> None:
    """Write the report of the run in ``folder``, and print where it is."""
    if try_report(folder):
        print_line(f"report: {folder / REPORT_FILE}")


def try_report(folder: Path, **options: bool) -> bool:
    """Write the report of the run in ``folder`` and return whether that worked; a failure is one logged line."""
    with never_failing("the report") as done:
        write_report([folder], folder, **options)
        done.append(True)
    return bool(done)


@contextmanager
def never_failing(what: str) -> Iterator[list[bool]]:
    """Log an error of the body in one line: no run fails for its report."""
    try:
        yield []
    except Exception as error:
        logger.info(f"note: {what} was not written: {type(error).__name__}: {first_line(error)[:300]}")
