"""``vlmpo report``, and the report at the end of a run and meanwhile: written, told in one line, harmless."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from tests.report.runs import write_run
from vlmpo.cli import app
from vlmpo.commands import report as command
from vlmpo.commands.report import ReportRefresh, report_at_end
from vlmpo.interrupt import Interrupted


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(command.logger, "handle", lambda record: lines.append(record.getMessage()))
    return lines


@pytest.mark.slow
def test_one_run_and_several(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second")
    result = CliRunner().invoke(app, ["report", str(first)])
    assert result.exit_code == 0, result.output
    assert result.output == f"report: {first / 'report.html'}, {first / 'report.png'}\n"
    result = CliRunner().invoke(app, ["report", str(first), str(second)])
    assert (tmp_path / "report.html").exists()
    result = CliRunner().invoke(app, ["report", str(first), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_an_output_that_is_named_like_a_file_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--output", str(tmp_path / "mine.html")])
    assert result.exit_code == 2
    assert "is a folder, which gets report.html and report.png" in result.output
    assert not (tmp_path / "mine.html").exists()


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds no run: neither metrics.jsonl nor manifest.json nor evaluation.json" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_report_is_written_however_a_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setattr("vlmpo.report.write.png_picture", lambda report: b"a picture")
    for number, end in enumerate((None, ValueError("x"), Interrupted(15, step=3))):
        folder = write_run(tmp_path / str(number))
        expected = nullcontext() if end is None else pytest.raises(type(end))
        with expected, report_at_end(folder, ranks=ranks):
            if end is not None:
                raise end
        assert (folder / "report.html").exists()
        assert (folder / "report.png").exists() == (ranks == 1 or not isinstance(end, Interrupted))


def test_a_report_that_fails_is_one_line_and_fails_nothing(tmp_path: Path, said: list[str]) -> None:
    with report_at_end(tmp_path / "absent"):
        pass
    assert said == [
        f"note: the report was not written: RunError: {tmp_path / 'absent'} is no folder; name a run folder"
    ]


def test_it_is_refreshed_every_few_minutes_with_curves_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    folder = write_run(tmp_path / "run")
    refresh, state = ReportRefresh(folder), SimpleNamespace(is_world_process_zero=True)
    page = folder / "report.html"
    refresh.on_log(None, state, None)
    assert not page.exists()
    now[0] += 181
    refresh.on_log(None, SimpleNamespace(is_world_process_zero=False), None)
    assert not page.exists()
    refresh.on_log(None, state, None)
    assert '<section id="loss"' in page.read_text("utf-8")
    assert '<section id="pairs"' not in page.read_text("utf-8")
    assert not (folder / "report.png").exists()
    page.unlink()
    (folder / "metrics.jsonl").unlink()
    (folder / "manifest.json").unlink()
    for _ in range(3):
        now[0] += 181
        refresh.on_log(None, state, None)
    assert len(said) == 1  # said once


@pytest.mark.slow
def test_the_command_line_imports_no_plotting_at_start() -> None:
    code = (
        "import sys, vlmpo.cli, vlmpo.commands.train; print([m for m in ('plotly', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
