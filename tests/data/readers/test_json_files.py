"""Files that are not what their name says: named as what they are, with the remedy."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import pytest

from vlmpo.data.dataset import open_pairs
from vlmpo.data.index.filter import screen
from vlmpo.data.readers.questions import read_questions
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.errors import DataError

PAIR = {"question": "Q?", "chosen": "good", "rejected": "bad"}


def details(path: Path) -> list[str]:
    """What is said of each line of a file."""
    return [
        f"{drop.origin.rpartition(':')[2]} {drop.detail}"
        for drop in screen(open_pairs([SourceSpec(str(path))])).dropped
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
@pytest.mark.parametrize("start", ["{", " \n{"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str, name: str, start: str) -> None:
    path = tmp_path / name
    path.write_bytes((start + json.dumps(PAIR)[1:]).encode(encoding))
    family = encoding[:6].upper()
    for read in (lambda: open_pairs([SourceSpec(str(path))]), lambda: read_questions(path)):
        with pytest.raises(DataError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}:1: the file is written in {family}, and JSON is read in UTF-8")
        assert f"iconv -f {family} -t UTF-8" in str(caught.value)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
@pytest.mark.parametrize(("kind", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)])
def test_packed_files_are_named(tmp_path: Path, name: str, kind: str, pack) -> None:
    (tmp_path / name).write_bytes(pack(json.dumps(PAIR).encode()))
    with pytest.raises(DataError, match=f"the file is packed with {kind}; unpack it"):
        open_pairs([SourceSpec(str(tmp_path / name))])
    (tmp_path / f"{name}.gz").write_bytes(b"")
    with pytest.raises(DataError, match="it is packed: unpack it"):
        open_pairs([SourceSpec(str(tmp_path / f"{name}.gz"))])


def test_zip_and_parquet_under_another_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.jsonl", "w") as file:
        file.writestr("a", "b")
    with pytest.raises(DataError, match="packed with zip"):
        open_pairs([SourceSpec(str(tmp_path / "p.jsonl"))])
    (tmp_path / "p.jsonl").write_bytes(b"PAR1....PAR1")
    with pytest.raises(DataError, match=r"the file is Parquet; name it \.parquet"):
        open_pairs([SourceSpec(str(tmp_path / "p.jsonl"))])


def test_an_array_in_a_file_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps([PAIR]))
    assert details(path) == [
        "1 the line holds a list; write one JSON object a line, or name a file that holds one array .json"
    ]


@pytest.mark.parametrize("indent", [1, 4, "\t"])
@pytest.mark.parametrize("value", [PAIR, [PAIR], {**PAIR, "image": ["a", "b"]}])
def test_objects_written_over_several_lines(tmp_path: Path, indent, value) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(value, indent=indent))
    found = details(path)
    assert len(found) == len(path.read_text().splitlines())
    assert all("an object written over several lines? write one JSON object a line" in line for line in found)


def test_other_lines_are_not_taken_for_parts_of_an_object(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a" "chosen"}\n{\'a\': 1}\nplain text\n{"a": tru}\n')
    assert not any("several lines" in line for line in details(path))


@pytest.mark.parametrize("content", [json.dumps(PAIR), json.dumps({"data": [PAIR]}), json.dumps({"a": 1})])
def test_a_json_file_of_one_object_that_is_no_meta_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(DataError, match=r"records belong in an array, or one a line in a file named \.jsonl"):
        open_pairs([SourceSpec(str(tmp_path / "p.json"))])


def test_a_json_file_of_lines(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(f"{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n")
    with pytest.raises(DataError, match=r"One JSON object a line is JSON Lines: name it \.jsonl"):
        open_pairs([SourceSpec(str(tmp_path / "p.json"))])
