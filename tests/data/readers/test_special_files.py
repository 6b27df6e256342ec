"""Pipes, devices and values that mean harm in lists of data sets: refused at once, in one line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from vlmpo.data.dataset import open_pairs
from vlmpo.data.encode.images import open_image, size_in_header
from vlmpo.data.index.filter import screen
from vlmpo.data.index.overlap import Item, find_overlaps
from vlmpo.data.readers.questions import read_questions
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.errors import DataError, RecordError

PAIR = {"question": "Q?", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for extension in ("jsonl", "json", "parquet", "png"):
        os.mkfifo(tmp_path / f"pipe.{extension}")
        (tmp_path / f"zero.{extension}").symlink_to("/dev/zero")
    (tmp_path / "p.jsonl").write_text(json.dumps(PAIR))
    return tmp_path


def refusal(path: Path, **settings: Any) -> str:
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        open_pairs([SourceSpec(str(path), **settings)])
    assert time.monotonic() - start < 5
    assert len(str(caught.value)) < 900
    return str(caught.value)


@pytest.mark.parametrize("name", ["pipe.jsonl", "pipe.json", "pipe.parquet", "zero.jsonl", "zero.json", "zero.parquet"])
def test_a_source_that_is_no_regular_file(folder: Path, name: str) -> None:
    path = folder / name
    assert refusal(path) == f"{path}: it is not a regular file but a pipe, a device or the like; name one"


def test_a_glob_or_folder_with_a_pipe_in_it(folder: Path) -> None:
    said = "is not a regular file but a pipe, a device or the like"
    assert f"{folder}/pipe.parquet {said}" in refusal(folder / "*.parquet")
    for place in (folder, folder / "data" / "train"):
        place.mkdir(parents=True, exist_ok=True)
        os.mkfifo(place / "more.csv")
        assert said in refusal(folder if place == folder else folder / "data")


def test_questions_and_images_in_a_pipe(folder: Path) -> None:
    with pytest.raises(DataError, match="no such file of questions"):
        read_questions(folder / "pipe.jsonl")
    for name in ("pipe.png", "zero.png"):
        path = str(folder / name)
        with pytest.raises(RecordError, match=r"is not a file; check the image root.*\[missing_image\]"):
            open_image(path)
        assert size_in_header(path) is None
        overlap = find_overlaps([Item("a", (path,), "")], {"eval": [Item("b", (path,), "")]})["eval"]
        assert (overlap.with_seen_image, overlap.seen_whole) == (0, 0)


def meta(folder: Path, **entry: Any) -> Path:
    path = folder / "meta.json"
    path.write_text(json.dumps({"a": {"annotation": "p.jsonl", **entry}}))
    return path


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"annotation": "pipe.jsonl"}, "annotation: {0}/pipe.jsonl is not a regular file; tried"),
        ({"annotation": "zero.jsonl"}, "annotation: {0}/zero.jsonl is not a regular file; tried"),
        ({"annotation": "/dev/zero"}, "annotation: /dev/zero is not a regular file; tried /dev/zero"),
        ({"annotation": "x" * 5000}, "annotation: no such file; tried"),
        ({"annotation": "a\0.jsonl"}, "annotation: no such file; tried"),
        ({"annotation": "\ud83d.jsonl"}, "annotation: no such file; tried"),
        ({"annotation": ["p.jsonl"]}, "annotation: must be a path, not a list"),
        ({"annotation": 5}, "annotation: must be a path, not a number"),
        ({"root": "pipe.png"}, "root: {0}/pipe.png is not a folder; tried"),
        ({"root": {}}, "root: must be a path, not an object"),
        ({"repeat_time": 1e300}, "repeat_time: must be at most 1000000"),
        ({"repeat_time": 10**400}, "repeat_time: must be at most 1000000"),
        ({"repeat_time": float("nan")}, "repeat_time: must be a number from 0 up, not nan"),
        ({"repeat_time": "x" * 999}, "repeat_time: must be a number from 0 up, not 'xxx"),
        ({"max_dynamic_patch": 10**400}, "max_dynamic_patch: must be at most 1000"),
        ({"max_dynamic_patch": 1001}, "max_dynamic_patch: must be at most 1000"),
        ({"max_dynamic_patch": [12]}, "max_dynamic_patch: must be a whole number from 1 up, not [12]"),
    ],
)
def test_hostile_values_in_a_meta_json(folder: Path, entry: dict[str, Any], words: str) -> None:
    assert f"meta.json: set 'a': {words.format(folder)}" in refusal(meta(folder, **entry))


@pytest.mark.parametrize("name", ["../../a", "a/b", "", "\x1b[31m", "x" * 1000])
def test_any_name_of_a_set_is_only_a_name(folder: Path, name: str) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps({name: {"annotation": "p.jsonl"}}))
    pairs = open_pairs([SourceSpec(str(path))])
    assert (pairs.source_names, len(screen(pairs).kept)) == ([name], 1)


def test_remarks_on_a_meta_json_are_few_and_short(folder: Path) -> None:
    entry = {"length": "l" * 10**5, **{f"{number}{'k' * 10**4}": 1 for number in range(1000)}}
    notices = open_pairs([SourceSpec(str(meta(folder, **entry)))]).notices
    assert len(notices) == 10
    assert "992 more keys are not known and have no effect" in notices[8]
    assert max(map(len, notices)) < 500


UNREADABLE = [b"[" * 10**5, b'{"a":' * 10**5, b'{"a": ' + b"9" * 5000 + b"}", b"{" + b" " * (17 << 20)]


@pytest.mark.parametrize("content", UNREADABLE, ids=["lists", "objects", "number", "size"])
@pytest.mark.parametrize("name", ["meta.json", "dataset_info.json"])
def test_lists_that_cannot_be_read(folder: Path, content: bytes, name: str) -> None:
    (folder / name).write_bytes(content)
    assert f"{folder}/{name}:" in refusal(folder / name)


def test_too_many_repeats(folder: Path) -> None:
    (folder / "p.jsonl").write_text("\n".join([json.dumps(PAIR)] * 1000))
    said = "repeat 1e+06 makes 1000000000 pairs of 1000 records, at most 268435456"
    assert refusal(folder / "p.jsonl", repeat=1e6) == f"p: {said}"
    assert refusal(meta(folder, repeat_time=1e6)) == f"a: {said}"
    assert "repeat: must be at most 1000000" in refusal(folder / "p.jsonl", repeat=1e7)


def info(folder: Path, **entry: Any) -> Path:
    path = folder / "dataset_info.json"
    path.write_text(json.dumps({"e": {"ranking": True, **entry}}))
    return path


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"file_name": "pipe.json"}, "pipe.json: it is not a regular file"),
        ({"file_name": "zero.jsonl"}, "zero.jsonl: it is not a regular file"),
        ({"file_name": "/dev/zero"}, "/dev/zero: no .jsonl, .json, .parquet file"),
        ({"file_name": "/"}, "/ holds the dataset_info.json itself; name a file or folder in it"),
        ({"file_name": ".."}, ".. holds the dataset_info.json itself"),
        ({"file_name": "."}, ". holds the dataset_info.json itself"),
        ({"file_name": "/**/*.parquet"}, "/**/*.parquet: no such file"),
        ({"file_name": "x" * 5000}, "no .jsonl, .json, .parquet file"),
        ({"file_name": "a\0.json"}, "no such file"),
        ({"file_name": 5}, "file_name must be a text, not a number"),
        ({"hf_hub_url": "/etc"}, "hf_hub_url must be a name org/name, not '/etc'"),
        ({"hf_hub_url": "../set"}, "hf_hub_url must be a name org/name, not '../set'"),
        ({"hf_hub_url": "a/b/c"}, "hf_hub_url must be a name org/name, not 'a/b/c'"),
        ({"hf_hub_url": ""}, "hf_hub_url must be a text, not an empty one"),
        ({"file_name": "p.jsonl", "formatting": ["alpaca"]}, "formatting ['alpaca'] is not known"),
        ({"file_name": "p.jsonl", "num_samples": 10**400}, "num_samples must be at most 1000000000"),
        ({"file_name": "p.jsonl", "num_samples": 10**9}, "makes 1000000000 pairs of 1 records, at most"),
        ({"file_name": "p.jsonl", "columns": {"prompt": 1}}, "prompt must be a text, not a number"),
    ],
)
def test_hostile_values_in_a_dataset_info(folder: Path, entry: dict[str, Any], words: str) -> None:
    assert words in refusal(info(folder, **entry))
