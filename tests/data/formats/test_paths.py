"""Which paths of images and videos are taken: below the image root, and outside it if the data are the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmpo.data.dataset import open_pairs
from vlmpo.data.formats import FORMATS, RecordContext
from vlmpo.data.formats.base import PathRules
from vlmpo.data.formats.paths import ABSOLUTE, ADDRESS, EMBEDDED, RELATIVE
from vlmpo.data.index.filter import screen
from vlmpo.data.readers.arrow import download_folders
from vlmpo.data.readers.questions import read_questions
from vlmpo.data.readers.spec import SourceSpec, _path_rules
from vlmpo.errors import DataError, RecordError

PAIR = {"question": "Q?", "chosen": "good", "rejected": "bad"}
HUB = PathRules(absolute_in=("/cache/hub", "/cache/downloads"))


def read(value: Any, rules: PathRules | None = None, root: str = "/data/set", key: str = "image") -> Any:
    """The image or video of a record, or the reason why it is refused."""
    context = RecordContext("f:1", image_root=root, paths=rules or PathRules())
    try:
        pair = FORMATS["mmpr"].parse({**PAIR, key: value}, context)
    except RecordError as error:
        return error.reason
    return (pair.images or pair.videos)[0]


@pytest.mark.parametrize("key", ["image", "images", "image_path", "video"])
@pytest.mark.parametrize(
    ("path", "result"),
    [
        ("a.png", "/data/set/a.png"),
        ("x/a.png", "/data/set/x/a.png"),
        ("x/../a.png", "/data/set/a.png"),
        ("..a.png", "/data/set/..a.png"),
        ("x/..y/a..png", "/data/set/x/..y/a..png"),
        ("../set/a.png", "/data/set/a.png"),
        ("../a.png", "outside_image_root"),
        ("x/../../a.png", "outside_image_root"),
        ("../../etc/a.png", "outside_image_root"),
        ("../set2/a.png", "outside_image_root"),
        ("./../a.png", "outside_image_root"),
        ("x//..//..//a.png", "outside_image_root"),
        ("/other/a.png", "/other/a.png"),
        ("/data/set/../a.png", "/data/a.png"),
        ("file:///other/a.png", "/other/a.png"),
        ("file://localhost/data/set/a%20b.png", "/data/set/a b.png"),
        ("file:///data/set/%2E%2E/a.png", "/data/a.png"),
    ],
)
def test_paths_of_local_files(key: str, path: str, result: str) -> None:
    assert read(path, key=key) == result


@pytest.mark.parametrize(
    ("path", "result"),
    [
        ("a.png", "/data/set/a.png"),
        ("../a.png", "outside_image_root"),
        ("/other/a.png", "outside_image_root"),
        ("/etc/passwd", "outside_image_root"),
        ("file:///other/a.png", "outside_image_root"),
        ("/cache/hub2/a.png", "outside_image_root"),
        ("/cache/hub/../a.png", "outside_image_root"),
        ("/data/set/a.png", "/data/set/a.png"),
        ("file:///data/set/a.png", "/data/set/a.png"),
        ("/cache/hub/models/a.png", "/cache/hub/models/a.png"),
        ("/cache/downloads/a.png", "/cache/downloads/a.png"),
        ({"bytes": None, "path": "/other/a.png"}, "outside_image_root"),
        ({"bytes": b"x", "path": "/other/a.png"}, b"x"),
    ],
)
def test_paths_of_a_data_set_of_the_hub(path: Any, result: Any) -> None:
    assert read(path, HUB) == result


def test_the_messages_name_the_path_and_the_remedy() -> None:
    parse = FORMATS["mmpr"].parse
    with pytest.raises(RecordError) as caught:
        parse({**PAIR, "image": "../a.png"}, RecordContext("f:1", image_root="/r"))
    remedy = "name the folder that holds them all under `image_root`"
    assert str(caught.value) == f"f:1: `image` leads out of /r: ../a.png; {remedy} [outside_image_root]"
    with pytest.raises(RecordError) as caught:
        parse({**PAIR, "image": "/a.png"}, RecordContext("f:1", image_root="/r", paths=HUB))
    assert str(caught.value) == (
        "f:1: `image` is outside its data set: /a.png; a data set of the Hub may not name files of this machine; "
        f"{remedy} if you trust it [outside_image_root]"
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of images with links to others in it and outside it."""
    for name in ("set", "set/blobs", "set2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"x")
    (tmp_path / "set" / "in.png").symlink_to(tmp_path / "set" / "blobs" / "a.png")
    (tmp_path / "set" / "out.png").symlink_to(tmp_path / "set2" / "a.png")
    (tmp_path / "set" / "folder").symlink_to(tmp_path / "set2")
    (tmp_path / "alias").symlink_to(tmp_path / "set")
    return tmp_path


PATHS = {
    # what is written: whether it is taken, and taken if confined
    "a.png": (True, True),
    "blobs/../a.png": (True, True),
    "in.png": (True, True),
    "{0}/set/a.png": (True, True),
    "file://{0}/set/in.png": (True, True),
    "{0}/alias/a.png": (True, True),
    "out.png": (True, False),
    "folder/a.png": (True, False),
    "{0}/set2/a.png": (True, False),
    "file://{0}/set2/a.png": (True, False),
    "{0}/set/out.png": (True, False),
    "{0}/set/../set2/a.png": (True, False),
    "../set2/a.png": (False, False),
    "folder/../a.png": (True, True),  # the one in the set: the link is not followed before `..`
    "folder/../../set2/a.png": (False, False),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("root", ["set", "alias"])
def test_confined_data(tree: Path, path: str, root: str) -> None:
    lines = tree / "set" / "p.jsonl"
    lines.write_text(json.dumps({**PAIR, "image": path.format(tree), "answer": "a"}))
    for confine, is_taken in zip((False, True), PATHS[path], strict=True):
        spec = SourceSpec(str(lines), image_root=str(tree / root), confine=confine)
        reasons = [drop.reason for drop in screen(open_pairs([spec])).dropped]
        assert reasons == ([] if is_taken else ["outside_image_root"])
        questions = read_questions(lines, tree / root, confine=confine)
        assert questions.counts() == ({} if is_taken else {"outside_image_root": 1})


@pytest.mark.parametrize("name", ["\0.png", "\ud83d.png", "x" * 5000, "/\0", "file:///%00"])
def test_names_that_no_file_can_have(tree: Path, name: str) -> None:
    lines = tree / "set" / "p.jsonl"
    lines.write_text(json.dumps({**PAIR, "image": name}))
    for confine in (False, True):
        (drop,) = screen(open_pairs([SourceSpec(str(lines), confine=confine)])).dropped
        assert drop.reason in ("missing_image", *(["outside_image_root"] if confine else []))


def info(tree: Path, image: str, **entry: Any) -> Path:
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    record = {"instruction": "Q?", "chosen": "a", "rejected": "b", "images": [image]}
    (tree / "set" / "p.json").write_text(json.dumps([record]))
    path = tree / "set" / "dataset_info.json"
    path.write_text(json.dumps({"e": {"file_name": "p.json", "ranking": True, "columns": columns, **entry}}))
    return path


@pytest.mark.parametrize(
    ("image", "taken"),
    [
        ("a.png", (True, True, True)),
        ("blobs/a.png", (True, True, True)),
        ("../set2/a.png", (True, False, False)),
        ("../set/../set2/a.png", (True, False, False)),
        ("../../a.png", (False, False, False)),
        ("../../../etc/hostname", (False, False, False)),
    ],
)
def test_a_dataset_info_may_reach_into_the_folder_above(tree: Path, image: str, taken: tuple[bool, ...]) -> None:
    path = info(tree, image)
    for settings, is_taken in zip(({}, {"image_root": str(tree / "set")}, {"confine": True}), taken, strict=True):
        reasons = [drop.reason for drop in screen(open_pairs([SourceSpec(str(path), **settings)])).dropped]
        assert reasons == ([] if is_taken else ["outside_image_root"]), settings


@pytest.mark.parametrize("place", ["{0}/elsewhere.json", "../../elsewhere.json", "link.json"])
def test_confined_lists_name_no_files_elsewhere(tree: Path, place: str) -> None:
    inner = tree / "inner"
    (inner / "set").mkdir(parents=True)
    elsewhere = tree / "elsewhere.json"
    elsewhere.write_text(json.dumps([PAIR]))
    (inner / "set" / "link.json").symlink_to(elsewhere)
    path = info(inner, "a.png", file_name=place.format(tree))
    with pytest.raises(DataError, match=f"leads out of {inner}, and data.confine is true"):
        open_pairs([SourceSpec(str(path), confine=True)])
    meta = inner / "set" / "meta.json"
    lines = place.format(tree) + "l"
    (tree / "elsewhere.jsonl").write_text(json.dumps(PAIR))
    (inner / "set" / "link.jsonl").symlink_to(tree / "elsewhere.jsonl")
    for entry in ({"annotation": lines}, {"annotation": "link.jsonl"}):
        meta.write_text(json.dumps({"a": entry}))
        with pytest.raises(DataError, match=f"set 'a': annotation: .* leads out of {inner}, and data.confine is true"):
            open_pairs([SourceSpec(str(meta), confine=True)])
        assert len(open_pairs([SourceSpec(str(meta))])) == 1


def test_the_rules_of_each_kind_of_source() -> None:
    spec = SourceSpec("x")
    assert _path_rules(spec, is_hub=False) == PathRules()
    assert _path_rules(spec, is_hub=True) == PathRules(absolute_in=download_folders())
    confined = SourceSpec("x", confine=True)
    for is_hub in (False, True):
        assert _path_rules(confined, is_hub) == PathRules(confine=True)


@pytest.mark.parametrize(
    ("record", "forms"),
    [
        ({}, set()),
        ({"image": "a.png"}, {RELATIVE}),
        ({"images": ["a.png", "b.png"]}, {RELATIVE}),
        ({"images": ["a.png", "/b.png"]}, {RELATIVE, ABSOLUTE}),
        ({"image": "file:///a.png"}, {ADDRESS}),
        ({"image": b"x"}, {EMBEDDED}),
        ({"image": {"bytes": b"x", "path": "/a.png"}}, {EMBEDDED}),
        ({"image": "data:image/png;base64,AAAA"}, {EMBEDDED}),
        ({"image": "a.png", "video": "/b.mp4"}, {RELATIVE, ABSOLUTE}),
    ],
)
def test_forms_are_noted(record: dict[str, Any], forms: set[str]) -> None:
    context = RecordContext("f:1", image_root="/r")
    marks = "".join("<image>" * len(record.get("images", ())))
    FORMATS["mmpr"].parse({**PAIR, "question": marks + "Q?", **record}, context)
    assert context.forms == forms
