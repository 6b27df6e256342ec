"""The report in a real browser, both themes, wide and narrow: no message in its console, every section with content."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report import runs
from tests.report.browser import Browser, find_browser
from tests.report.test_report import CHARTS, SECTIONS
from vlmpo.report.write import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here (Debian: chromium-headless-shell)"),
]
DRAWN = """[...document.querySelectorAll("[data-chart]")].filter(
    box => box.querySelectorAll(".scatterlayer path.js-line, .scatterlayer path.point").length > 0
).map(box => box.dataset.chart)"""
FULL = """[...document.querySelectorAll("section")].filter(
    section => section.textContent.length > 60 && section.innerText.length > 20
).map(section => section.id)"""
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
LIGHT, DARK = "rgb(246, 247, 249)", "rgb(18, 22, 29)"


@pytest.mark.parametrize("hostile", [False, True], ids=["plain", "hostile"])
def test_it_is_drawn_in_both_themes_without_a_message(tmp_path: Path, hostile: bool) -> None:
    words = {"text": runs.HOSTILE, "source": runs.HOSTILE} if hostile else {}
    folder = runs.write_run(tmp_path / "run", **words)
    other = runs.write_run(tmp_path / "other")
    write_report([folder], folder, with_picture=False)
    write_report([folder, other], tmp_path, with_picture=False)
    program = find_browser()
    assert program is not None
    with Browser(program, tmp_path / "profile") as browser:
        for page in (folder / "report.html", tmp_path / "report.html"):
            for width in (1280, 400):
                for dark in (False, True):
                    browser.show(page, width=width, dark=dark)
                    assert browser.evaluate(DRAWN) == CHARTS
                    assert browser.evaluate(FULL) == SECTIONS
                    assert browser.evaluate(BACKGROUND) == (DARK if dark else LIGHT)
                    assert browser.evaluate("document.documentElement.scrollWidth") <= width
                    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            browser.evaluate("document.getElementById('theme').click()")
            assert browser.evaluate(BACKGROUND) == LIGHT
            assert browser.evaluate("document.getElementById('theme').getAttribute('aria-pressed')") == "false"
            assert "owned" not in browser.evaluate("document.title")
        assert browser.problems == []
        browser.evaluate("document.querySelector('.tokens').textContent = 'word '.repeat(2000)")
        browser.evaluate("window.dispatchEvent(new Event('resize'))")
        assert browser.evaluate("document.querySelector('.tokens').matches('.cut:not(.end)[tabindex]')")
        browser.evaluate("document.querySelector('.tokens').scrollTop = 1e6")
        browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert browser.evaluate("document.querySelector('.tokens').matches('.cut.end[tabindex]')")
        assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
