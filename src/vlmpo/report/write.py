"""Write the report of runs: ``report.html``, and ``report.png`` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmpo.fileio import replace_bytes, replace_text
from vlmpo.report.content import Limits, report_of
from vlmpo.report.files import read_runs
from vlmpo.report.page import html_page
from vlmpo.report.picture import png_picture

REPORT_FILE = "report.html"
PICTURE_FILE = "report.png"
MAX_BYTES = 7_500_000


def write_report(
    folders: Sequence[Path], output: Path, *, curves_only: bool = False, with_picture: bool = True
) -> list[Path]:
    """Write the report of the runs in ``folders`` and return the files written; each is replaced in one step.

    Args:
        folders: run folders, evaluation folders or a demo's folder.
        output: the folder to write into.
        curves_only: leave pairs, answers and evaluations out: the run is under way.
        with_picture: write the PNG too, which takes a second or two.

    Raises:
        RunError: a folder holds nothing to report on.
        OSError: the files cannot be written.
    """
    runs = [run for folder in folders for run in read_runs(folder)]
    limits = Limits()
    for _ in range(8):
        report = report_of(runs, limits, curves_only=curves_only)
        page = html_page(report)
        if len(page.encode("utf-8", "backslashreplace")) <= MAX_BYTES:
            break
        limits = limits.halved()
    replace_text(output / REPORT_FILE, page)
    written = [output / REPORT_FILE]
    picture = png_picture(report) if with_picture else None
    if picture is not None:
        replace_bytes(output / PICTURE_FILE, picture)
        written.append(output / PICTURE_FILE)
    return written
