"""Progress in a log: a line every 30 seconds, nothing before."""

from __future__ import annotations

import pytest

from vlmpo import log
from vlmpo.log import Progress, logger, print_error, print_line, print_table, shown


def test_progress_in_a_log_is_a_line_every_30_seconds(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with Progress("reading", 200, "records", transient=True) as progress:
        progress.update(0, 200)
        for done in range(10, 130, 10):
            now[0] += 5.0
            progress.update(done, 200)
    with Progress("sampling", 4, "responses") as progress:
        progress.advance(1)
        now[0] += 40.0
        progress.advance(1)
        progress.notice("note: [not] markup")
    assert capsys.readouterr().err == (
        "reading: 60/200, 2.0 records/s, 70 s left\n"
        "reading: 120/200, 2.0 records/s, 40 s left\n"
        "sampling: 2/4, 0.1 responses/s, 40 s left\n"
        "note: [not] markup\n"
    )


@pytest.mark.parametrize(
    ("raw", "seen"),
    [
        ("a\x1b[31mred\x07", r"a\x1b[31mred\x07"),
        ("title\x1b]0;x\x9c", r"title\x1b]0;x\x9c"),
        ("100\rcheap", r"100\rcheap"),
        ("abc\u202etxt.exe", r"abc\u202etxt.exe"),
        ("a\u200bb\u2066c\ufeff", r"a\u200bb\u2066c\ufeff"),
        ("tag\U000e0041", r"tag\U000e0041"),
        ("[red]x[/red] :smile: {y}", "[red]x[/red] :smile: {y}"),
        ("Größe 漢字 é", "Größe 漢字 é"),
    ],
    ids=["colour", "title", "return", "bidi", "invisible", "tag", "markup", "plain"],
)
def test_control_characters_are_shown_not_sent(raw: str, seen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(raw) == seen
    print_line(raw)
    assert capsys.readouterr().out == f"{seen}\n"
    print_table("t", [("name", "n"), (raw, 1)])
    assert seen in capsys.readouterr().out
    print_error("error: ", raw)
    assert capsys.readouterr().err == f"error: {seen}\n"
    logger.info(raw)
    assert capsys.readouterr().err == f"{seen}\n"


def test_half_a_character_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("half " + chr(0xD800))
    assert capsys.readouterr().out == "half " + r"\ud800" + "\n"


def test_a_newline_in_a_cell_makes_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("t", [("name", "n"), ("a\nb", 1)])
    assert capsys.readouterr().out.splitlines()[-1] == r"  a\nb  1"
