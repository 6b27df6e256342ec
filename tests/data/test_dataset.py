"""Files of pairs into a PairDataset: what is read, what is refused and under which name, who is held out."""

import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import drop_reasons
from tests.paths import SHARED
from vlmpo.data.dataset import PairDataset, open_pairs
from vlmpo.data.index.filter import Dropped, screen, split_hold_out
from vlmpo.data.readers import json as jsonfiles
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import DataError, RecipeError, RecordError

VISONLYQA = SHARED / "data" / "visonlyqa"
needs_visonlyqa = pytest.mark.skipif(not VISONLYQA.is_dir(), reason="../shared/data/visonlyqa is not there")


def record(**changes: Any) -> dict[str, Any]:
    return {"question": "Q?", "chosen": "good", "rejected": "bad"} | changes


def write_lines(path: Path, records: list[Any]) -> str:
    """Each record on a line; strings as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def open_lines(tmp_path: Path, records: list[Any], **options: Any) -> PairDataset:
    return open_pairs([SourceSpec(write_lines(tmp_path / "pairs.jsonl", records))], **options)


def chosen(dataset: PairDataset) -> list[str]:
    return [dataset[i].chosen for i in range(len(dataset))]


def numbered(count: int, prefix: str = "") -> list[dict[str, Any]]:
    return [record(chosen=f"{prefix}{i}") for i in range(count)]


# --- one record


def test_a_pair_holds_what_its_line_says(tmp_path: Path) -> None:
    line = record(image="a/b.png", question="What?", id=7, tags=["x"], video=None)
    dataset = open_pairs(
        [SourceSpec(write_lines(tmp_path / "my.jsonl", [record(), line]), str(tmp_path), max_tiles=4, name="mine")]
    )
    assert dataset[1] == PreferencePair(
        prompt=(Message("user", "<image>\nWhat?"),),
        images=(f"{tmp_path}/a/b.png",),
        chosen="good",
        rejected="bad",
        source="mine",
        origin=f"{tmp_path}/my.jsonl:2",
        max_tiles=4,
        metadata={"id": 7, "tags": ["x"]},
    )
    assert (dataset.origin(1), dataset.source(1)) == (f"{tmp_path}/my.jsonl:2", "mine")


@pytest.mark.parametrize(
    ("image", "question", "text", "names"),
    [
        ("a.png", "Q?", "<image>\nQ?", ["a.png"]),
        (["a.png"], "Q?", "<image>\nQ?", ["a.png"]),
        ("a.png", "Q <image> here?", "Q <image> here?", ["a.png"]),
        ("a.png", "", "<image>\n", ["a.png"]),
        (["a.png", "b.png"], "<image> or <image>?", "<image> or <image>?", ["a.png", "b.png"]),
        (["a.png", "a.png"], "<image><image>", "<image><image>", ["a.png", "a.png"]),
        (None, "Q?", "Q?", []),
        ([], "Q?", "Q?", []),
        ("", "Q?", "Q?", []),
    ],
)
def test_images_and_their_places(tmp_path: Path, image: Any, question: str, text: str, names: list[str]) -> None:
    pair = open_lines(tmp_path, [record(image=image, question=question)])[0]
    assert pair.prompt == (Message("user", text),)
    assert pair.images == tuple(f"{tmp_path}/{name}" for name in names)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"video": "a.mp4"}, "<video>\nQ?"),
        ({"video": ["a.mp4"], "question": "Q <video> here?"}, "Q <video> here?"),
        ({"video": "a.mp4", "image": "a.png"}, "<image>\n<video>\nQ?"),
    ],
)
def test_videos_and_their_places(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    pair = open_lines(tmp_path, [record(**changes)])[0]
    assert pair.prompt == (Message("user", text),)
    assert pair.videos == (f"{tmp_path}/a.mp4",)
    assert drop_reasons(open_lines(tmp_path, [record(video="a.mp4")])) == ["missing_video"]
    (tmp_path / "a.mp4").write_bytes(b"looked at, not opened")
    assert drop_reasons(open_lines(tmp_path, [record(video="a.mp4")])) == []


def test_an_absolute_image_path_stays(tmp_path: Path) -> None:
    assert open_lines(tmp_path, [record(image="/elsewhere/a.png")])[0].images == ("/elsewhere/a.png",)


BAD_LINES = [
    pytest.param("{nonsense", "bad_json", "not valid JSON", id="no JSON"),
    pytest.param('{"question": "a"', "bad_json", "not valid JSON", id="cut off"),
    pytest.param("[1, 2]", "bad_json", "holds a list", id="a list"),
    pytest.param("17", "bad_json", "holds a number", id="a number"),
    pytest.param("[" * 100_000, "bad_json", "recursion", id="endless nesting"),
    pytest.param(
        r'{"question": "\ud83d", "chosen": "a", "rejected": "b"}', "bad_json", "surrogate", id="half a character"
    ),
    pytest.param({"chosen": "a", "rejected": "b"}, "missing_field", "`question` is missing", id="no question"),
    pytest.param({"question": "a", "rejected": "b"}, "missing_field", "`chosen` is missing", id="no chosen"),
    pytest.param({"question": "a", "chosen": "b"}, "missing_field", "`rejected` is missing", id="no rejected"),
    pytest.param(record(rejected=None), "missing_field", "`rejected` must be a string, not null", id="null"),
    pytest.param(record(chosen=["a"]), "missing_field", "`chosen` must be a string, not a list", id="list"),
    pytest.param(record(question=3), "missing_field", "`question` must be a string, not a number", id="number"),
    pytest.param(record(question=" "), "missing_field", "`question` is empty and there is no image", id="no prompt"),
    pytest.param(record(image={"at": "a"}), "missing_field", "`image` must be a path", id="image object"),
    pytest.param(record(image=["a.png", None]), "missing_field", "`image` must be a path", id="null among images"),
    pytest.param(record(image="https://a.net/b.png"), "missing_image", "a web address (https://a.net", id="address"),
    pytest.param(record(image="a", images=["a"]), "ambiguous_field", "holds `image` and `images`", id="two keys"),
    pytest.param(record(video=3), "missing_field", "`video` must be a path", id="video"),
    pytest.param(record(video="a", question="<video><video>"), "placeholder_mismatch", "2 <video> for 1", id="v 1, 2"),
    pytest.param(record(question="<video> Q"), "placeholder_mismatch", "1 <video> for 0", id="v 0, 1"),
    pytest.param(
        record(image="a.png", question="<image><image>"), "placeholder_mismatch", "2 <image> for 1", id="1, 2"
    ),
    pytest.param(record(image=["a", "b"], question="<image>"), "placeholder_mismatch", "1 <image> for 2", id="2, 1"),
    pytest.param(record(image=["a", "b"]), "placeholder_mismatch", "0 <image> for 2", id="2, 0"),
    pytest.param(record(question="<image> Q"), "placeholder_mismatch", "1 <image> for 0", id="0, 1"),
    pytest.param(record(chosen=""), "empty_response", "`chosen` is empty", id="chosen empty"),
    pytest.param(record(rejected=" \n\t"), "empty_response", "`rejected` is empty", id="rejected blank"),
    pytest.param(record(rejected="good"), "identical", "are the same", id="identical"),
]


@pytest.mark.parametrize(("line", "reason", "detail"), BAD_LINES)
def test_bad_record_is_named(tmp_path: Path, line: Any, reason: str, detail: str) -> None:
    dataset = open_lines(tmp_path, [record(), "", line, record(chosen="after")])
    with pytest.raises(RecordError) as caught:
        dataset[1]
    assert (caught.value.reason, caught.value.origin) == (reason, f"{tmp_path}/pairs.jsonl:3")
    assert detail in caught.value.detail
    assert dataset[2].chosen == "after"
    assert screen(dataset).dropped == [Dropped(1, caught.value.origin, reason, caught.value.detail)]


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"question": "Größe?", "chosen": "a", "rejected": "b"}\n'.encode("latin-1"))
    with pytest.raises(RecordError, match=r"latin\.jsonl:1: the line is not valid JSON in UTF-8.*\[bad_json\]"):
        open_pairs([SourceSpec(str(path))])[0]


def test_responses_that_differ_in_space_only_are_two(tmp_path: Path) -> None:
    pair = open_lines(tmp_path, [record(chosen="good", rejected="good ")])[0]
    assert (pair.chosen, pair.rejected) == ("good", "good ")


@pytest.mark.parametrize("rejected", ["absent", None, "", "good", 3])
def test_fine_tuning_does_not_look_at_rejected(tmp_path: Path, rejected: Any) -> None:
    line = record(rejected=rejected)
    if rejected == "absent":
        del line["rejected"]
    dataset = open_lines(tmp_path, [line, record(chosen=" ")], need_rejected=False)
    assert (dataset[0].chosen, dataset[0].rejected, dataset[0].metadata) == ("good", None, {})
    assert drop_reasons(dataset) == ["empty_response"]
    assert dataset.select([0])[0].rejected is None


# --- lines


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last_newline", [True, False])
def test_blank_lines_line_ends_and_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, end: str, bom: bytes, last_newline: bool
) -> None:
    monkeypatch.setattr(jsonfiles, "_CHUNK", chunk)
    lines = ["", json.dumps(record(chosen="two")), "  \t ", "", " " + json.dumps(record(chosen="five ü")), "{"]
    content = bom + end.join(lines).encode() + (end.encode() if last_newline else b"")
    (tmp_path / "a.jsonl").write_bytes(content)
    dataset = open_pairs([SourceSpec(str(tmp_path / "a.jsonl"))])
    assert [dataset.origin(i).rpartition(":")[2] for i in range(len(dataset))] == ["2", "5", "6"]
    assert [dataset[0].chosen, dataset[1].chosen] == ["two", "five ü"]
    assert drop_reasons(dataset) == ["bad_json"]


def test_byte_order_mark_before_the_first_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(record()).encode())
    assert chosen(open_pairs([SourceSpec(str(tmp_path / "a.jsonl"))])) == ["good"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_large_file_stays_on_disk(tmp_path: Path) -> None:
    count = 200_000
    with (tmp_path / "large.jsonl").open("w") as file:
        for i in range(count):
            file.write(json.dumps(record(question=f"question {i} " + "x" * 500, chosen=f"c{i}")) + "\n")
    size = (tmp_path / "large.jsonl").stat().st_size
    assert size > 100e6
    script = f"""if True:
        from vlmpo.data.dataset import open_pairs
        from vlmpo.data.readers.spec import SourceSpec
        def peak():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
        before = peak()
        dataset = open_pairs([SourceSpec({str(tmp_path / "large.jsonl")!r})])
        values = [dataset[i].chosen for i in (0, 1, 99_999, 123_456, -1)]
        print(len(dataset), peak() - before, *values, dataset.origin(-1))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    length, growth, *values = done.stdout.split()
    assert int(length) == count
    assert values == ["c0", "c1", "c99999", "c123456", "c199999", f"{tmp_path}/large.jsonl:200000"]
    assert int(growth) < 60e6  # two chunks of 8 MiB and their masks, 24 bytes a record: far below the file's size


def test_a_file_that_changed_since_it_was_opened(tmp_path: Path) -> None:
    dataset = open_lines(tmp_path, numbered(3))
    write_lines(tmp_path / "pairs.jsonl", numbered(2))
    with pytest.raises(DataError, match=r"pairs\.jsonl: \d+ bytes when opened, \d+ now"):
        dataset[0]


# --- views, pickling, processes


def test_select_is_a_view_in_the_given_order(tmp_path: Path) -> None:
    dataset = open_lines(tmp_path, numbered(10))
    view = dataset.select(np.array([7, 2, 2, 9]))
    assert chosen(view) == ["7", "2", "2", "9"]
    assert chosen(view.select([3, 0])) == ["9", "7"]
    assert view.origin(0) == f"{tmp_path}/pairs.jsonl:8"
    assert len(dataset) == 10


def test_index_past_the_end_and_iteration(tmp_path: Path) -> None:
    dataset = open_lines(tmp_path, numbered(3))
    assert dataset[-1].chosen == "2"
    with pytest.raises(IndexError):
        dataset[3]
    assert [pair.chosen for pair in dataset] == ["0", "1", "2"]  # type: ignore[attr-defined]


def test_pickled_after_use(tmp_path: Path) -> None:
    dataset = open_lines(tmp_path, numbered(5)).select([4, 1])
    assert chosen(dataset) == ["4", "1"]  # the map is open now
    again = pickle.loads(pickle.dumps(dataset))
    assert chosen(again) == ["4", "1"]
    assert (again.origin(0), again.source_names, again.notices) == (dataset.origin(0), ["pairs"], [])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_read_in_another_process(tmp_path: Path, method: str) -> None:
    dataset = open_lines(tmp_path, numbered(5))
    assert dataset[0].chosen == "0"
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(dataset.__getitem__, range(5)) == [dataset[i] for i in range(5)]


# --- specs and meta.json


def write_meta(path: Path, **sets: Any) -> SourceSpec:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sets))
    return SourceSpec(str(path))


def test_meta_paths_are_tried_above_beside_and_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "cwd"
    here.mkdir()
    monkeypatch.chdir(here)
    spec = write_meta(tmp_path / "up" / "mm" / "meta.json", a={"root": "images", "annotation": "a.jsonl"})
    bases = [tmp_path / "cwd", tmp_path / "up" / "mm", tmp_path / "up"]  # the last one goes first
    expected = [str(base / "a.jsonl") for base in reversed(bases)]
    with pytest.raises(DataError) as caught:
        open_pairs([spec])
    assert f"set 'a': annotation: no such file; tried {', '.join(expected)}" in str(caught.value)
    for base in bases:
        write_lines(base / "a.jsonl", [record(image="i.png")])
        (base / "images").mkdir()
        pair = open_pairs([spec])[0]
        assert (pair.origin, pair.images) == (f"{base}/a.jsonl:1", (f"{base}/images/i.png",))


def test_meta_absolute_paths_and_no_root(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "else" / "a.jsonl", [record(image="i.png")])
    (tmp_path / "pics").mkdir()
    spec = write_meta(
        tmp_path / "m" / "meta.json",
        a={"root": str(tmp_path / "pics"), "annotation": path},
        b={"annotation": path},
    )
    dataset = open_pairs([spec])
    assert [dataset[i].images[0] for i in range(2)] == [f"{tmp_path}/pics/i.png", f"{tmp_path}/else/i.png"]


def test_meta_root_that_is_missing_names_every_path_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "m" / "a.jsonl", [record()])
    spec = write_meta(tmp_path / "m" / "meta.json", a={"root": "pics", "annotation": "a.jsonl"})
    with pytest.raises(DataError) as caught:
        open_pairs([spec])
    # above is also the working directory here: named once
    assert str(caught.value).endswith(f"set 'a': root: no such folder; tried {tmp_path}/pics, {tmp_path}/m/pics")


def test_meta_settings_and_those_of_the_spec(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", numbered(4, "a"))
    write_lines(tmp_path / "b.jsonl", numbered(2, "b"))
    path = write_meta(
        tmp_path / "meta.json",
        a={"annotation": "a.jsonl", "repeat_time": 0.5, "max_dynamic_patch": 6, "length": 4},
        b={"annotation": "b.jsonl", "repeat_time": 1},
    ).path
    dataset = open_pairs([SourceSpec(path)])
    assert [dataset.source(i) for i in range(len(dataset))] == ["a", "a", "b", "b"]
    assert [dataset[i].max_tiles for i in range(4)] == [6, 6, None, None]
    assert dataset.notices == []
    # repeat multiplies: a 0.5 * 2 = 1, b 1 * 2 = 2; max_tiles of the spec goes first; the name goes before
    dataset = open_pairs([SourceSpec(path, repeat=2.0, max_tiles=3, name="mm")])
    assert chosen(dataset) == ["a0", "a1", "a2", "a3", "b0", "b1", "b0", "b1"]
    assert {dataset[i].max_tiles for i in range(8)} == {3}
    assert dataset.source_names == ["mm/a", "mm/b"]


def test_repeat(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", numbered(100))

    def rows(repeat: float, seed: int = 0) -> list[int]:
        return [int(text) for text in chosen(open_pairs([SourceSpec(path, repeat=repeat)], seed=seed))]

    assert rows(1) == list(range(100))
    assert rows(3) == 3 * list(range(100))
    for seed in range(5):
        some = rows(0.3, seed)
        assert len(some) == 30
        assert some == sorted(set(some))  # no pair twice, in file order
        assert rows(0.3, seed) == some
        more = rows(1.3, seed)
        assert more == list(range(100)) + some
    assert len({tuple(rows(0.3, seed)) for seed in range(5)}) == 5


def test_a_subset_does_not_depend_on_the_other_sources(tmp_path: Path) -> None:
    a = SourceSpec(write_lines(tmp_path / "a.jsonl", numbered(50, "a")), repeat=0.5)
    b = SourceSpec(write_lines(tmp_path / "b.jsonl", numbered(50, "b")), repeat=0.5)
    alone = chosen(open_pairs([a]))
    assert chosen(open_pairs([b, a]))[25:] == alone
    assert [text[1:] for text in chosen(open_pairs([b]))] != [text[1:] for text in alone]


def test_every_pair_is_drawn_equally_often(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", numbered(10))
    drawn = np.zeros(10)
    for seed in range(400):
        for text in chosen(open_pairs([SourceSpec(path, repeat=0.3)], seed=seed)):
            drawn[int(text)] += 1
    assert drawn.sum() == 1200
    assert np.abs(drawn - 120).max() < 40  # standard deviation: sqrt(400 * 0.3 * 0.7) = 9


def test_notices(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", numbered(3))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    spec = write_meta(
        tmp_path / "meta.json",
        a={"annotation": "a.jsonl", "data_augment": True, "length": 4, "max_dynamic_patches": 6, "x": 1},
        b={"annotation": "a.jsonl", "data_augment": False, "length": 3, "repeat_time": 0},
        c={"annotation": "empty.jsonl"},
    )
    meta = spec.path
    assert open_pairs([spec]).notices == [
        f"{meta}: set 'a': data_augment is set, but images are read as they are "
        "(InternVL's trainer would degrade them by JPEG compression)",
        f"{meta}: set 'a': key 'max_dynamic_patches' is not known and has no effect; did you mean 'max_dynamic_patch'?",
        f"{meta}: set 'a': key 'x' is not known and has no effect",
        f"a: meta.json says length 4, {tmp_path}/a.jsonl has 3",
        f"b: adds no pair (3 records in {tmp_path}/a.jsonl, repeat 0)",
        f"c: adds no pair (0 records in {tmp_path}/empty.jsonl, repeat 1)",
    ]


def test_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    specs = [SourceSpec(write_lines(tmp_path / folder / "train.jsonl", numbered(1, folder))) for folder in "xyz"]
    dataset = open_pairs(specs)
    assert dataset.source_names == ["train", "train-2", "train-3"]
    assert [(pair.source, pair.chosen) for pair in (dataset[0], dataset[1], dataset[2])] == [
        ("train", "x0"),
        ("train-2", "y0"),
        ("train-3", "z0"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "cannot be read", id="no JSON"),
        pytest.param('{"a": {}}\n{"a": {}}', "is JSON Lines: name it .jsonl", id="lines"),
        pytest.param("{}", "empty; it must be one JSON object", id="empty"),
        pytest.param("3", "a number; it must be one JSON object", id="number"),
        pytest.param(
            '{"a": 1}', "set 'a': must be an object with `root` and `annotation`, not a number", id="no entry"
        ),
        pytest.param('{"a": {"root": "."}}', "set 'a': annotation: must be a path, not null", id="no annotation"),
        pytest.param('{"a": {"annotation": "p.jsonl", "root": 3}}', "root: must be a path, not a number", id="root"),
        pytest.param('{"a": {"annotation": "meta.json"}}', "meta.json is not a .jsonl file", id="annotation"),
        pytest.param('{"a": {}, "a": {}}', "'a' is given 2 times", id="twice"),
        pytest.param(
            '{"a": {"annotation": "p.jsonl", "repeat_time": "2"}}',
            "repeat_time: must be a number from 0 up",
            id="repeat",
        ),
        pytest.param(
            '{"a": {"annotation": "p.jsonl", "max_dynamic_patch": 0}}', "must be a whole number from 1 up", id="tiles"
        ),
    ],
)
def test_malformed_meta(tmp_path: Path, content: str, message: str) -> None:
    write_lines(tmp_path / "p.jsonl", [record()])
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(DataError) as caught:
        open_pairs([SourceSpec(str(tmp_path / "meta.json"))])
    assert str(caught.value).startswith(f"{tmp_path}/meta.json: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        pytest.param({"path": "no.jsonl"}, "no.jsonl: no such file; looked for {0}/no.jsonl", id="no file"),
        pytest.param({"path": "p.csv"}, "p.csv: no .jsonl, .json, .parquet file and no folder", id="extension"),
        pytest.param({"path": "p.parquet"}, "p.parquet: no such file; looked for {0}/p.parquet", id="no table"),
        pytest.param({"path": "p-*.parquet"}, "p-*.parquet: no file matches {0}/p-*.parquet", id="no match"),
        pytest.param({"path": "p.*"}, "matches {0}/p.jsonl; several files in one source must all be", id="match"),
        pytest.param({"path": "p.jsonl", "split": "train"}, "p.jsonl: split: has no effect on a file", id="split"),
        pytest.param({"path": "p.jsonl", "subset": "a"}, "p.jsonl: subset: has no effect here", id="subset"),
        pytest.param({"path": "p.jsonl", "format": "x"}, "format: 'x' is not known; known are auto, mmpr", id="format"),
        pytest.param({"path": "p.jsonl", "image_root": "no"}, "image_root {0}/no is not a folder", id="image root"),
        pytest.param({"path": "m.json", "image_root": "."}, "image_root is for other sources", id="image root of meta"),
        pytest.param({"path": "p.jsonl", "repeat": -1}, "p.jsonl: repeat: must be a number from 0 up, not -1", id="-1"),
        pytest.param({"path": "p.jsonl", "repeat": float("nan")}, "must be a number from 0 up, not nan", id="nan"),
        pytest.param({"path": "p.jsonl", "max_tiles": 0}, "max_tiles: must be a whole number from 1 up", id="tiles"),
        pytest.param({"path": "p.jsonl", "repeat": 0}, "no pair in p.jsonl", id="nothing left"),
    ],
)
def test_specs_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "p.jsonl", [record()])
    write_meta(tmp_path / "m.json", a={"annotation": "p.jsonl"})
    with pytest.raises(DataError) as caught:
        open_pairs([SourceSpec(**spec)])
    assert message.format(tmp_path) in str(caught.value)


def test_no_source_at_all() -> None:
    with pytest.raises(DataError, match="no source is named"):
        open_pairs([])


def test_relative_paths_outlive_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "p.jsonl", [record(image="i.png")])
    (tmp_path / "pics").mkdir()
    monkeypatch.chdir(tmp_path)
    dataset = open_pairs([SourceSpec("p.jsonl", image_root="pics")])
    monkeypatch.chdir("/")
    assert dataset[0].images == (f"{tmp_path}/pics/i.png",)


# --- screening


def test_screen_accounts_for_every_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(b"")
    a = write_lines(
        tmp_path / "a.jsonl",
        [
            record(image="one.png"),
            record(image="gone.png"),
            record(image="gone.png", chosen="other"),
            record(image=["one.png", "gone.png"], question="<image> <image>"),
            record(image=["one.png", "two.png"], question="<image> <image>"),
        ],
    )
    b = write_lines(tmp_path / "b.jsonl", [record(), record(rejected="good"), "{"])
    (tmp_path / "c.jsonl").write_text("")
    looked_at: list[str] = []
    real_isfile = os.path.isfile
    dataset = open_pairs([SourceSpec(a), SourceSpec(b, repeat=2), SourceSpec(str(tmp_path / "c.jsonl"))])
    monkeypatch.setattr(os.path, "isfile", lambda path: (looked_at.append(path), real_isfile(path))[1])
    seen: list[tuple[int, int]] = []
    result = screen(dataset, progress=lambda done, total: seen.append((done, total)))

    assert result.kept.tolist() == [0, 4, 5, 8]
    assert result.kept.dtype == np.int64
    assert [(d.index, d.origin.removeprefix(f"{tmp_path}/"), d.reason) for d in result.dropped] == [
        (1, "a.jsonl:2", "missing_image"),
        (2, "a.jsonl:3", "missing_image"),
        (3, "a.jsonl:4", "missing_image"),
        (6, "b.jsonl:2", "identical"),
        (7, "b.jsonl:3", "bad_json"),
        (9, "b.jsonl:2", "identical"),
        (10, "b.jsonl:3", "bad_json"),
    ]
    assert f"image {tmp_path}/gone.png does not exist" in result.dropped[0].detail
    assert result.read == {"a": 5, "b": 6, "c": 0}
    assert Counter(dataset.source(pair.index) for pair in result.dropped) == {"a": 3, "b": 4}
    assert sorted(looked_at) == [f"{tmp_path}/{name}.png" for name in ("gone", "one", "two")]  # each once
    assert seen == [(5, 8), (8, 8)]  # records: what is repeated is read once


def test_progress_of_a_longer_screening(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    screen(open_lines(tmp_path, numbered(2500)), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1000, 2500), (2000, 2500), (2500, 2500)]


# --- held-out pairs


def held_out(dataset: PairDataset, fraction: float, seed: int = 0) -> tuple[list[PreferencePair], list[PreferencePair]]:
    train, held = split_hold_out(dataset, np.arange(len(dataset)), fraction, seed)
    assert sorted([*train, *held]) == list(range(len(dataset)))
    assert train.tolist() == sorted(train)
    assert held.tolist() == sorted(held)
    return [dataset[i] for i in train], [dataset[i] for i in held]


def test_no_image_on_both_sides_and_just_enough_held_out(tmp_path: Path) -> None:
    lines = [record(image=f"{i % 40}.png", chosen=f"c{i}") for i in range(200)]  # 40 images, 5 pairs each
    dataset = open_lines(tmp_path, lines)
    for seed in range(5):
        train, held = held_out(dataset, 0.1, seed)
        assert len(held) == 20
        assert not {p.images for p in train} & {p.images for p in held}
    # 0.11 * 200 = 22 pairs: a fifth image is needed
    assert len(held_out(dataset, 0.11)[1]) == 25
    assert len({tuple(p.chosen for p in held_out(dataset, 0.1, seed)[1]) for seed in range(5)}) == 5


def test_split_knows_neither_order_nor_place(tmp_path: Path) -> None:
    lines = [record(image=f"{i % 30}.png", chosen=f"c{i}") for i in range(90)]
    shuffled = random.Random(1).sample(lines, len(lines))
    first = held_out(open_lines(tmp_path / "here", lines), 0.2)[1]
    second = held_out(open_lines(tmp_path / "there", shuffled), 0.2)[1]
    assert {p.chosen for p in first} == {p.chosen for p in second}
    assert len(first) == 18


def test_files_of_one_name_in_two_folders_are_two_images(tmp_path: Path) -> None:
    lines = [record(image=f"{folder}/0.png", chosen=folder) for folder in "abcdefgh"]
    assert len(held_out(open_lines(tmp_path, lines), 0.5)[1]) == 4


def test_images_linked_through_a_pair_of_several_stay_together(tmp_path: Path) -> None:
    chain = [
        record(image=[f"{i}.png", f"{i + 1}.png"], question="<image><image>", chosen=f"chain{i}") for i in range(6)
    ]
    single = [record(image="3.png", chosen="chain"), record(image="./6.png", chosen="chain")]
    others = [record(image=f"other{i}.png", chosen=f"o{i}") for i in range(8)]
    together = 0
    for seed in range(10):
        train, held = held_out(open_lines(tmp_path, [*chain, *single, *others]), 0.2, seed)
        sides = {p.chosen.startswith("chain") for p in held}, {p.chosen.startswith("chain") for p in train}
        assert not (True in sides[0] and True in sides[1])
        together += True in sides[0]
    assert 0 < together < 10  # the group of eight is drawn for some seeds, and whole


def test_text_only_pairs_are_split_by_prompt(tmp_path: Path) -> None:
    lines = [record(question=f"Q{i % 10}", chosen=f"c{i}") for i in range(30)]
    train, held = held_out(open_lines(tmp_path, lines), 0.3)
    assert len(held) == 9
    assert not {p.prompt for p in train} & {p.prompt for p in held}


def test_repeats_of_a_pair_stay_on_one_side(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [record(question=f"Q{i}", chosen=f"c{i}") for i in range(10)])
    train, held = held_out(open_pairs([SourceSpec(path, repeat=3)]), 0.3)
    assert len(held) == 9
    assert not {p.chosen for p in train} & {p.chosen for p in held}


def test_split_of_some_pairs_only(tmp_path: Path) -> None:
    dataset = open_lines(tmp_path, ["{", *(record(question=f"Q{i}") for i in range(10))])
    train, held = split_hold_out(dataset, screen(dataset).kept, 0.2, 0)
    assert len(held) == 2
    assert sorted([*train, *held]) == list(range(1, 11))


def test_nothing_to_hold_out(tmp_path: Path) -> None:
    dataset = open_lines(tmp_path, numbered(3))
    train, held = split_hold_out(dataset, [2, 0], 0.0, 0)
    assert (train.tolist(), held.tolist()) == ([2, 0], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fraction_out_of_range(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(RecipeError, match="hold_out must be from 0 to below 1"):
        split_hold_out(open_lines(tmp_path, numbered(3)), [0, 1, 2], fraction, 0)


def test_pairs_of_a_single_image_cannot_be_split(tmp_path: Path) -> None:
    dataset = open_lines(tmp_path, [record(image="a.png", chosen=f"c{i}") for i in range(5)])
    with pytest.raises(RecipeError, match="the 5 pairs form 1 groups that share no image"):
        split_hold_out(dataset, np.arange(5), 0.2, 0)


# --- real data


@needs_visonlyqa
def test_visonlyqa_is_read_whole() -> None:
    dataset = open_pairs([SourceSpec(str(VISONLYQA / "meta.json"))])
    assert dataset.source_names == ["visonlyqa_reasoning", "visonlyqa_no_reasoning"]
    assert dataset.notices == []
    result = screen(dataset)
    assert result.kept.tolist() == list(range(1617))
    assert result.read == {"visonlyqa_reasoning": 1047, "visonlyqa_no_reasoning": 570}
    files = [VISONLYQA / "annotations" / f"{name}.jsonl" for name in ("reasoning", "no_reasoning")]
    lines = [(file, number, json.loads(text)) for file in files for number, text in enumerate(file.open(), start=1)]
    for index, (file, number, line) in enumerate(lines):
        pair = dataset[index]
        assert pair.origin == f"{file}:{number}"
        assert pair.images == (str(VISONLYQA / "images" / line["image"]),)
        assert (pair.prompt[0].text, pair.chosen, pair.rejected) == (
            "<image>\n" + line["question"],
            line["chosen"],
            line["rejected"],
        )


@needs_visonlyqa
def test_visonlyqa_held_out_tenth() -> None:
    dataset = open_pairs([SourceSpec(str(VISONLYQA / "meta.json"))])
    train, held = held_out(dataset, 0.1)
    most_on_one_image = max(sum(p.images == q.images for q in train) for p in train)
    assert 161.7 <= len(held) < 161.7 + most_on_one_image
    assert not {p.images for p in train} & {p.images for p in held}
    assert {p.source for p in held} == {"visonlyqa_reasoning", "visonlyqa_no_reasoning"}
