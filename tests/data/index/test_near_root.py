"""Tests for finding the folder that a wrong image root was meant to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmpo.data.index import near_root
from vlmpo.data.index.near_root import find_root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """``set/pairs.jsonl``, ``set/pics/a/{0,1}.png``, ``set/other/a/0.png``, ``far/x/y/z/pics/b/0.png``."""
    for name in ("set/pics/a/0.png", "set/pics/a/1.png", "set/other/a/0.png", "far/x/y/z/pics/b/0.png", "set/in/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("root", "names", "expected"),
    [
        ("set", ["a/0.png", "a/1.png"], "set/pics"),  # below
        ("set/in", ["a/0.png", "a/1.png"], "set/pics"),  # beside
        ("set/pics/a", ["a/0.png", "a/1.png"], "set/pics"),  # above
        ("set/pics", ["pics/a/1.png"], "set"),
        ("far", ["a/1.png"], "set/pics"),  # beside the folder's own
        ("set", ["a/0.png", "a/2.png"], None),  # one of them is nowhere
        ("set", ["b/0.png"], None),  # too far away
    ],
)
def test_the_folder_that_has_them_all(root: str, names: list[str], expected: str | None, tree: Path) -> None:
    assert find_root(str(tree / root), names) == (None if expected is None else str(tree / expected))


def test_the_search_is_bounded(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_root, "_MOST_FOLDERS", 3)
    assert find_root(str(tree / "set"), ["a/1.png"]) is None
    monkeypatch.setattr(near_root, "_MOST_FOLDERS", 4)
    assert find_root(str(tree / "set"), ["a/1.png"]) == str(tree / "set" / "pics")
