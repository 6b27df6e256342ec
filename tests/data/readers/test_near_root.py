"""Tests for finding the folder that a wrong image root was meant to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmpo.data.readers import near_root
from vlmpo.data.readers.near_root import find_root, no_folder
from vlmpo.data.readers.questions import read_questions
from vlmpo.errors import DataError


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


def test_an_image_root_that_does_not_exist_names_the_one_beside_it(tree: Path) -> None:
    wrong = tree / "set" / "pic"
    assert no_folder(str(wrong)) == f"image_root {wrong} is not a folder; did you mean {tree / 'set' / 'pics'}?"
    assert no_folder("/nowhere/at/all") == "image_root /nowhere/at/all is not a folder"


def test_questions_name_the_root_that_has_their_images(tree: Path) -> None:
    """If most of their files are missing: of one that is, nothing can be said."""
    file = tree / "set" / "questions.jsonl"
    rows = [{"question": "?", "answer": "1", "image": f"a/{n}.png"} for n in (0, 1)]
    file.write_text("\n".join(map(json.dumps, rows)))
    dropped = read_questions(str(file), image_root=str(tree / "set" / "in")).dropped
    assert [error.reason for error in dropped] == ["missing_image"] * 2
    assert all(f"its files are in {tree / 'set' / 'pics'}: name that as its image_root" in str(e) for e in dropped)
    assert read_questions(str(file), image_root=str(tree / "set" / "pics")).dropped == []
    file.write_text("\n".join(map(json.dumps, [*rows, {"question": "?", "answer": "1", "image": "a/2.png"}])))
    (error,) = read_questions(str(file), image_root=str(tree / "set" / "pics")).dropped
    assert "its files are in" not in str(error)
    with pytest.raises(DataError, match=r"did you mean .*pics"):
        read_questions(str(file), image_root=str(tree / "set" / "pcs"))
