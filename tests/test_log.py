"""Progress in a log: a line every 30 seconds, nothing before."""

from __future__ import annotations

import pytest

from vlmpo import log
from vlmpo.log import Progress


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
