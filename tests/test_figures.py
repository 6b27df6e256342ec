"""Blocks of figures in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.figures import fill
from tests.paths import REPO

PAGE = "# Page\n\n<!-- a -->\nold\n<!-- end of a -->\n\n<!-- b -->\n\nkept\n\n<!-- end of b -->\n"


def test_a_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    fill(page, "a", "| new |\n")
    assert page.read_text() == PAGE.replace("old\n", "\n| new |\n\n")
    fill(page, "a", "newer")
    assert page.read_text() == PAGE.replace("old\n", "\nnewer\n\n")


@pytest.mark.parametrize("text", ["", "<!-- a -->\n", "<!-- end of a -->\n"])
def test_a_page_without_the_block_is_refused(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="has no block a"):
        fill(page, "a", "new")
    assert page.read_text() == text


@pytest.mark.parametrize("command", ["torture", "fuzz"])
def test_the_page_on_reliability_has_both_blocks(tmp_path: Path, command: str) -> None:
    page = tmp_path / "page.md"
    page.write_text((REPO / "docs" / "reliability.md").read_text())
    fill(page, f"figures of make {command}", "| figures |")
    assert "\n| figures |\n" in page.read_text()
