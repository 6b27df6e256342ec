"""The table of families in the docs is the one the tests build."""

from __future__ import annotations

from tests import families_table
from tests.zoo import FAMILIES


def test_the_committed_table_is_the_generated_one() -> None:
    remedy = "write it anew: python -m tests.families_table"
    assert families_table.FILE.read_text(encoding="utf-8") == families_table.text(), remedy


def test_every_family_has_its_line() -> None:
    lines = [line for line in families_table.text().splitlines() if line.startswith("| ")]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert cells[0][0] == "family"
    assert [row[0] for row in cells[2:]] == list(FAMILIES)
    rows = {row[0]: row for row in cells[2:]}
    assert rows["internvl-qwen2"][1:6] == [
        "`InternVLForConditionalGeneration`",
        "`qwen2`",
        "shared",
        "0, 1, 2",
        "tiles",
    ]
    assert rows["gemma2-text"][3] == "separate"
    assert "not on the list" in rows["gemma2-text"][6]
    assert {name: rows[name][5] for name in ("idefics3", "qwen3-vl", "llava-next")} == {
        "idefics3": "tiles",
        "qwen3-vl": "pixels",
        "llava-next": "none",
    }
