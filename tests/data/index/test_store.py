"""A data set opened a second time: the same pairs, drops, split and overlaps as from the start, without reading it."""

import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from tests.data import drop_reasons
from vlmpo.data import dataset as sources
from vlmpo.data.dataset import PairDataset, open_pairs
from vlmpo.data.index import filter, scan, store
from vlmpo.data.index.filter import screen, split_hold_out
from vlmpo.data.index.overlap import Item, Overlap, find_overlaps
from vlmpo.data.index.record_index import Medium, RecordIndex, Row, index_batch, index_table
from vlmpo.data.index.store import Cache, Stamp, cache_folder
from vlmpo.data.readers.spec import SourceSpec


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which data sets of any size are kept."""
    monkeypatch.setenv("VLMPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "MIN_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of records each time a source is scanned by reading it."""
    seen: list[int] = []
    real = scan._read_records

    def counted(source: Any, records: Any) -> pa.RecordBatch:
        seen.append(len(records))
        return real(source, records)

    monkeypatch.setattr(scan, "_read_records", counted)
    return seen


def record(**changes: Any) -> dict[str, Any]:
    return {"question": "Q?", "chosen": "good", "rejected": "bad"} | changes


def write(path: Path, records: list[Any]) -> None:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))


def write_everything(root: Path) -> list[SourceSpec]:
    """Lines, an array and a table, with all kinds of faults, images alone and linked, repeats; 113 records."""
    (root / "images").mkdir(parents=True)
    for number in range(12):
        (root / "images" / f"{number}.png").write_bytes(b"image %d" % number)
    draw = random.Random(0)

    def line(number: int) -> Any:
        image = f"images/{draw.randrange(14)}.png"  # 12 and 13 are not there
        kinds = [
            record(image=image, chosen=f"c{number}"),
            record(question=f"words {draw.randrange(9)}", chosen=f"c{number}"),
            record(image=[image, "images/3.png"], question="<image><image>", chosen=f"c{number}"),
            record(rejected="good"),
            record(image=image, video="gone.mp4"),
            '{"question":',
            "",
            record(question="ü \u2028", system="S", note=number),
        ]
        return kinds[draw.choices(range(8), [9, 3, 1, 1, 1, 1, 1, 1])[0]]

    write(root / "a.jsonl", [line(number) for number in range(80)])
    (root / "b.json").write_text(json.dumps([line(0) for _ in range(20)] + [record(chosen="last")], indent=1))
    held = [{"bytes": b"embedded %d" % (number % 5), "path": None} for number in range(20)]
    rows = {"question": ["Q"] * 20, "chosen": [f"c{i}" for i in range(20)], "rejected": ["r"] * 19 + ["c19"]}
    datasets.Dataset.from_dict({**rows, "image": held}).to_parquet(root / "c.parquet")
    return [
        SourceSpec(str(root / "a.jsonl"), repeat=2.5),
        SourceSpec(str(root / "b.json"), repeat=0.5, format="mmpr"),
        SourceSpec(str(root / "c.parquet")),
    ]


def everything(specs: list[SourceSpec], **options: Any) -> dict[str, Any]:
    """All that is found of a data set, as plain values."""
    dataset = open_pairs(specs, **options)
    screened = screen(dataset)
    train, held = split_hold_out(dataset, screened.kept, 0.2, 3)
    overlaps = find_overlaps(
        dataset.select(train), {"held": dataset.select(held), "all": dataset.select(screened.kept)}
    )
    return {
        "pairs": [dataset[int(index)] for index in screened.kept],
        "kept": screened.kept.tolist(),
        "dropped": list(screened.dropped),
        "read": screened.read,
        "counts": Counter(drop.reason for drop in screened.dropped),
        "train": train.tolist(),
        "held": held.tolist(),
        "overlaps": overlaps,
        "notices": dataset.notices,
    }


def from_the_start(specs: list[SourceSpec], **options: Any) -> dict[str, Any]:
    """The same with no cache at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "MIN_BYTES", 1 << 60)
        return everything(specs, **options)


# --- cold, warm


def test_the_second_opening_finds_the_same_and_reads_nothing(tmp_path: Path, folder: Path, reads: list[int]) -> None:
    specs = write_everything(tmp_path / "data")
    expected = from_the_start(specs)
    assert not folder.exists()
    assert expected["counts"].keys() == {"missing_image", "missing_video", "identical", "bad_json"}
    assert min(len(expected["train"]), len(expected["held"])) > 20
    reads.clear()
    assert everything(specs) == expected
    assert len(reads) == 3  # each source once, for the screening, the split and the overlaps together
    reads.clear()
    assert everything(specs) == expected
    assert reads == []
    assert sorted({path.name.split("-")[0] for path in folder.glob("*.arrow")}) == ["array", "lines", "records"]


def test_a_small_data_set_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMPO_CACHE", str(tmp_path / "cache"))
    everything(write_everything(tmp_path / "data"))
    assert not (tmp_path / "cache").exists()


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMPO_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.delenv("VLMPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert cache_folder() == Path("/var/x/vlmpo")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, as its specification says
    assert cache_folder() == Path.home() / ".cache" / "vlmpo"


# --- what makes an entry stale


@pytest.mark.parametrize("large", [False, True], ids=["hashed whole", "hashed in parts"])
@pytest.mark.parametrize("change", ["appended", "same size", "same size and time", "replaced by a copy of another"])
def test_an_edited_file_is_read_again(
    tmp_path: Path, folder: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch, change: str, large: bool
) -> None:
    if large:
        for name, value in {"_HASHED_WHOLE": 0, "_ENDS": 8, "_SAMPLES": 2, "_SAMPLE": 4}.items():
            monkeypatch.setattr(store, name, value)
    path = tmp_path / "a.jsonl"
    write(path, [record(question=f"Q{i}", chosen="good") for i in range(30)])
    specs = [SourceSpec(str(path))]
    everything(specs)
    everything(specs)
    assert reads == [30]
    before = path.stat()
    text = path.read_text()
    if change == "appended":
        path.write_text(text + json.dumps(record(rejected="good")) + "\n")
    elif change == "replaced by a copy of another":
        (tmp_path / "b").write_text(text.replace("good", "bad!"))
        os.utime(tmp_path / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(tmp_path / "b", path)
    else:
        time.sleep(0.02)  # the clock of files ticks every few milliseconds
        path.write_text(text.replace('"bad"', '"good"', 12).replace('"good"', '"bad"', 12))
        if change == "same size and time":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert path.stat().st_size == before.st_size
    reads.clear()
    found = everything(specs)
    assert sum(reads) == (31 if change == "appended" else 30)
    assert found == from_the_start(specs)


def test_other_settings_are_other_entries(tmp_path: Path, folder: Path, reads: list[int]) -> None:
    root = tmp_path / "data"
    write_everything(root)
    (root / "elsewhere" / "images").mkdir(parents=True)
    (root / "elsewhere" / "images" / "3.png").write_bytes(b"3")
    path = str(root / "a.jsonl")
    settings: list[tuple[SourceSpec, dict[str, Any]]] = [
        (SourceSpec(path), {}),
        (SourceSpec(path), {"need_rejected": False}),
        (SourceSpec(path, image_root=str(root / "elsewhere")), {}),
        (SourceSpec(path, format="rlaif_v"), {}),
        (SourceSpec(path, repeat=0.5), {"seed": 1}),
        (SourceSpec(path, repeat=0.5), {"seed": 2}),
    ]
    expected = [from_the_start([spec], **options) for spec, options in settings]
    assert expected[0]["counts"] != expected[1]["counts"]
    assert expected[0]["counts"] != expected[2]["counts"]
    reads.clear()
    for again in (False, True):
        for (spec, options), values in zip(settings, expected, strict=True):
            assert everything([spec], **options) == values
        assert len(reads) == 6, again
    assert len(list(folder.glob("records-*.arrow"))) == 6
    assert len(list(folder.glob("lines-*.arrow"))) == 1


def test_tiles_and_names_do_not_matter(tmp_path: Path, folder: Path, reads: list[int]) -> None:
    specs = write_everything(tmp_path / "data")
    everything(specs[:1])
    reads.clear()
    dataset = open_pairs([SourceSpec(specs[0].path, name="other", max_tiles=5)])
    screened = screen(dataset)
    assert screened.read.keys() == {"other"}
    assert dataset[int(screened.kept[0])].max_tiles == 5
    assert reads == []


def test_other_rules_are_other_entries(
    tmp_path: Path, folder: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = write_everything(tmp_path / "data")[:1]
    everything(specs)
    monkeypatch.setattr(store, "code_hash", lambda: "a later version")
    reads.clear()
    everything(specs)
    assert len(reads) == 1
    assert len(list(folder.glob("*.arrow"))) == 2  # those of the version before are gone


def test_entries_of_an_earlier_state_go(tmp_path: Path, folder: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path in (a, b):
        write(path, [record(question=f"Q{i}") for i in range(10)])
        screen(open_pairs([SourceSpec(str(path))]))
    before = {path.name for path in folder.glob("*.arrow")}
    write(a, [record(question=f"Q{i}") for i in range(11)])
    screen(open_pairs([SourceSpec(str(a))]))
    after = {path.name for path in folder.glob("*.arrow")}
    assert len(before) == len(after) == 4
    assert len(before & after) == 2


# --- images come and go


def index_of(media: list[list[Medium]]) -> RecordIndex:
    """An index of records that show these images and videos."""
    rows = [Row(at, words=1, prompt=1, media=row) for at, row in enumerate(media)]
    return RecordIndex(index_table([index_batch(rows)]))


@pytest.mark.parametrize("listed_from", [1, 32])
def test_an_image_that_goes_is_missed_and_one_that_comes_is_seen(
    tmp_path: Path, folder: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch, listed_from: int
) -> None:
    monkeypatch.setattr(filter, "MIN_LISTED", listed_from)
    specs = write_everything(tmp_path / "data")
    everything(specs)
    reads.clear()
    (tmp_path / "data" / "images" / "5.png").unlink()
    (tmp_path / "data" / "images" / "6.png").unlink()
    (tmp_path / "data" / "images" / "6.png").mkdir()
    (tmp_path / "data" / "images" / "12.png").write_bytes(b"came")
    found = everything(specs)
    assert reads == []
    assert found == from_the_start(specs)
    gone = [drop.detail for drop in found["dropped"] if drop.reason == "missing_image"]
    assert any("images/5.png does not exist" in detail for detail in gone)
    assert any("images/6.png is not a file" in detail for detail in gone)
    assert not any("images/12.png" in detail for detail in gone)


def test_images_are_looked_for_as_isfile_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "ü ü.png").write_bytes(b"")
    (tmp_path / "link.png").symlink_to("file.png")
    (tmp_path / "broken.png").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to("folder")
    (tmp_path / "folder" / "in.png").write_bytes(b"")
    names = ["file.png", "folder", "ü ü.png", "link.png", "broken.png", "linked", "linked/in.png", "folder/in.png"]
    names += ["file.png/", "folder/../file.png", "a\0b", "half \ud83d.png", "..", ".", "x/y.png", "gone", "./file.png"]
    paths = [os.path.join(tmp_path, name) for name in names]
    for listed_from in (1, 1000):
        monkeypatch.setattr(filter, "MIN_LISTED", listed_from)
        index = index_of([[Medium.of(path) for path in paths]])
        missing = filter.find_missing(index)
        for number, (_, _, path) in index.shown_media():
            what = "is not a file" if os.path.exists(path) else "does not exist"
            assert (number not in missing) == os.path.isfile(path), path
            assert number not in missing or missing[number][1].startswith(f"image {path} {what}; "), path


def test_a_folder_is_listed_instead_of_asking_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        (tmp_path / f"{number}.png").write_bytes(b"")
    write(tmp_path / "a.jsonl", [record(image=f"{number}.png") for number in range(101)])
    dataset = open_pairs([SourceSpec(str(tmp_path / "a.jsonl"))])
    asked: list[str] = []
    real = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: (asked.append(path), real(path))[1])
    assert drop_reasons(dataset) == ["missing_image"]
    assert asked == [str(tmp_path / "100.png")]


# --- damaged entries, and folders that cannot be used


def entries(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(folder.glob("*.arrow")):
        yield path, path.read_bytes()


def test_a_damaged_entry_is_made_anew(tmp_path: Path, folder: Path) -> None:
    specs = write_everything(tmp_path / "data")[:1]
    expected = everything(specs)
    draw = random.Random(0)
    for path, content in entries(folder):
        places = [*range(40), *draw.sample(range(len(content)), 40), len(content) - 1]
        damages = [content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :] for at in places]
        damages += [content[:at] for at in (0, 1, 31, 40, len(content) // 2, len(content) - 1)]
        damages += [content + b"\0", bytes(len(content)), b"vlmpo"]
        key = pa.ipc.open_stream(content).schema.metadata[b"vlmpo"].decode()
        assert store._read(path, key) is not None
        for damaged in damages:
            path.unlink()  # a mapped file is never cut: entries are replaced
            path.write_bytes(damaged)
            assert store._read(path, key) is None
        assert everything(specs) == expected
        assert path.read_bytes() == content


def test_an_entry_under_another_name_is_not_taken(tmp_path: Path, folder: Path, reads: list[int]) -> None:
    for name, count in (("a", 5), ("b", 7)):
        write(tmp_path / f"{name}.jsonl", [record(question=f"Q{i}") for i in range(count)])
        screen(open_pairs([SourceSpec(str(tmp_path / f"{name}.jsonl"))]))
    one, other = sorted(folder.glob("records-*.arrow"))
    one.write_bytes(other.read_bytes())
    reads.clear()
    for name, count in (("a", 5), ("b", 7)):
        assert screen(open_pairs([SourceSpec(str(tmp_path / f"{name}.jsonl"))])).kept.tolist() == list(range(count))
    assert len(reads) == 1


def test_without_a_usable_folder_all_works_and_one_line_says_so(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = write_everything(tmp_path / "data")
    expected = from_the_start(specs)
    folder.write_text("a file where the folder should be")
    for _ in range(2):
        found = everything(specs)
        (remark,) = found.pop("notices")
        assert f"the cache folder {folder} cannot be used" in remark
        assert "VLMPO_CACHE" in remark
        assert found == {key: value for key, value in expected.items() if key != "notices"}


def test_a_full_disk_leaves_no_part_of_an_entry(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = write_everything(tmp_path / "data")[:1]
    expected = from_the_start(specs)

    def full(path: str, table: pa.Table) -> None:
        Path(path).write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write_table", full)
    found = everything(specs)
    assert "No space left" in found.pop("notices")[0]
    assert found == {key: value for key, value in expected.items() if key != "notices"}
    assert {path.suffix for path in folder.iterdir()} == {".lock"}


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [record(question=f"Q{i}") for i in range(10)])
    real = scan._read_records

    def touched(*args: Any) -> pa.RecordBatch:
        os.utime(path, ns=(1, 1))
        return real(*args)

    monkeypatch.setattr(scan, "_read_records", touched)
    assert len(screen(open_pairs([SourceSpec(str(path))])).kept) == 10
    assert list(folder.glob("records-*.arrow")) == []


# --- several processes


def run_together(work: Callable[[], Any], processes: int) -> list[Any]:
    """The results of ``work`` in several forked processes that start at once."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.SimpleQueue()

    def body() -> None:
        barrier.wait()
        results.put(work())

    started = [context.Process(target=body) for _ in range(processes)]
    for process in started:
        process.start()
    found = [results.get() for _ in started]
    for process in started:
        process.join()
    return found


@pytest.mark.slow
def test_of_several_processes_one_reads_and_all_find_the_same(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = write_everything(tmp_path / "data")
    expected = from_the_start(specs)
    log = tmp_path / "log"
    real = scan._read_records

    def logged(*args: Any) -> pa.RecordBatch:
        with log.open("a") as file:
            file.write("read\n")
        time.sleep(0.05)
        return real(*args)

    monkeypatch.setattr(scan, "_read_records", logged)
    found = run_together(lambda: everything(specs), 4)
    assert all(values == expected for values in found)
    assert log.read_text() == "read\n" * 3  # once a source


@pytest.mark.slow
def test_who_waits_is_told_and_a_killed_reader_holds_nobody_up(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "data").write_text("x")
    stamp = Stamp.of([str(tmp_path / "data")])
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def hangs() -> pa.Table:
        begun.set()
        time.sleep(600)
        raise AssertionError("not reached")

    holder = context.Process(target=lambda: Cache().table("kind", stamp, [], hangs))
    holder.start()
    assert begun.wait(60)
    told: list[int] = []

    def waiting() -> None:
        told.append(1)
        os.kill(holder.pid, signal.SIGKILL)

    found = Cache().table("kind", stamp, [], lambda: pa.table({"a": np.arange(3)}), waiting)
    holder.join()
    assert told == [1]
    assert found["a"].to_pylist() == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "processes"), [(1, 1), (7, 1), (7, 3), (1000, 2)])
def test_chunks_and_processes_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, processes: int
) -> None:
    specs = write_everything(tmp_path / "data")[:2]
    expected = everything(specs)
    whole = [source.index.table for source in open_pairs(specs).scan()]
    monkeypatch.setattr(scan, "_CHUNK", chunk)
    monkeypatch.setattr(scan, "MIN_PARALLEL", 0)
    monkeypatch.setattr(scan, "_processes", lambda each_rank_reads: processes)
    assert [source.index.table for source in open_pairs(specs).scan()] == whole
    assert everything(specs) == expected


def test_processes_are_shared_among_ranks_that_each_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    monkeypatch.setattr(scan.sys, "platform", "linux")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert scan._processes(each_rank_reads=False) == 12
    assert scan._processes(each_rank_reads=True) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "40")
    assert scan._processes(each_rank_reads=True) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_map_the_index_instead_of_receiving_it(tmp_path: Path, folder: Path, method: str) -> None:
    write(tmp_path / "a.jsonl", [record(chosen=f"c{i}") for i in range(5000)])
    dataset = open_pairs([SourceSpec(str(tmp_path / "a.jsonl"))]).select([4999, 17])
    screen(dataset)
    assert len(pickle.dumps(dataset)) < 8000  # the index alone has 80,000 bytes
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert [pair.chosen for pair in pool.map(dataset.__getitem__, [0, 1])] == ["c4999", "c17"]
    for path in folder.glob("*.arrow"):
        path.unlink()
    assert pickle.loads(pickle.dumps(dataset))[1].chosen == "c17"  # made anew


# --- the parts


def test_media_of_any_name_are_held_once() -> None:
    names = ["", "a", "ü€😀", "half \ud83d", "a\0b", "two  spaces", "x" * 1000]
    media = [[Medium.of(name) for name in names], [], [Medium.of("a", "video"), Medium.of("a"), Medium.of(b"a")]]
    index = index_of(media)
    assert [medium.name for _, medium in index.shown_media()][: len(names)] == names
    assert index.media.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 1, 8]
    assert [medium for _, medium in index.take(np.array([2, 1])).shown_media()] == [
        media[2][1],
        media[2][0],
        media[2][2],
    ]
    is_wanted = np.arange(index.media_count) == 1
    assert index.shows_any(is_wanted).tolist() == [True, False, True]
    assert index.take(np.array([1, 2, 2])).shows_any(is_wanted).tolist() == [False, True, True]
    assert (index.find(np.array([2, 0])).tolist(), index.find(np.array([1, 3]))) == ([2, 0], None)
    assert len(RecordIndex(index_table([]))) == 0


def test_linked_groups_match_a_walk_through_the_graph() -> None:
    draw = np.random.default_rng(0)
    for trial in range(200):
        nodes = draw.choice(1 << 40, draw.integers(2, 60), replace=False).astype(np.uint64)
        links = draw.choice(nodes, (draw.integers(1, 70), 2))
        keys = np.concatenate([nodes, draw.choice(1 << 50, 5).astype(np.uint64)])
        neighbours: dict[int, set[int]] = {int(key): set() for key in keys}
        for a, b in links.tolist():
            neighbours[a].add(b)
            neighbours[b].add(a)
        expected = []
        for key in keys.tolist():
            reached, left = {key}, [key]
            while left:
                fresh = neighbours[left.pop()] - reached
                reached |= fresh
                left += fresh
            expected.append(min(reached))
        assert filter._linked(keys, links).tolist() == expected, trial
    chain = np.arange(5000, dtype=np.uint64)[draw.permutation(5000)]
    assert not filter._linked(chain, np.stack([np.arange(4999), np.arange(1, 5000)], 1).astype(np.uint64)).any()


def naive_overlap(training: list[Item], evaluation: list[Item]) -> Overlap:
    """By the definition: every file read whole, contents compared as bytes."""

    def content(image: Any) -> bytes | None:
        if isinstance(image, bytes):
            return image
        return Path(image).read_bytes() if os.path.isfile(image) else None

    def prompt(item: Item) -> tuple[Any, ...]:
        return " ".join(item.text.lower().replace("<image>", " ").split()), *map(content, item.images)

    images = {content(image) for item in training for image in item.images} - {None}
    prompts = {prompt(item) for item in training}
    with_image = [any(content(image) in images for image in item.images) for item in evaluation]
    whole = [None not in prompt(item) and prompt(item) in prompts for item in evaluation]
    seen = [item.origin for item, a, b in zip(evaluation, with_image, whole, strict=True) if a or b]
    return Overlap(len(evaluation), sum(with_image), sum(whole), tuple(seen[:3]))


def test_overlaps_match_the_definition(tmp_path: Path) -> None:
    draw = random.Random(1)
    middles = [bytes([value]) for value in b"abcdef"]
    # Alike in size, beginning and end; only the middle tells them apart. Some stand under two names.
    contents = [b"h" * 5000 + middle + b"t" * 5000 for middle in middles] + [b"short", b"", b"shorx"]
    for number in range(24):
        (tmp_path / str(number)).write_bytes(contents[number % len(contents)])

    def item(number: int) -> Item:
        kinds = [str(tmp_path / str(draw.randrange(26))), draw.choice(contents)]  # 24 and 25 are not there
        images = tuple(draw.choice(kinds) for _ in range(draw.choice([0, 1, 1, 1, 2])))
        return Item(draw.choice(["How many?", "how  MANY?", "which?"]) + " <image>" * len(images), images, f"o{number}")

    wholes = 0
    for _ in range(60):
        training = [item(i) for i in range(draw.randrange(1, 9))]
        evaluations = {name: [item(i) for i in range(draw.randrange(9))] for name in "ab"}
        found = find_overlaps(training, evaluations)
        assert found == {name: naive_overlap(training, items) for name, items in evaluations.items()}
        wholes += found["a"].seen_whole
    assert wholes > 10


def test_images_that_cannot_match_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmpo.data.index import overlap

    for name, content in {"a": b"x" * 100, "b": b"y" * 101, "c": b"z" * 100, "d": b"z" * 100}.items():
        (tmp_path / name).write_bytes(content)
    read: list[str] = []
    real = overlap._file_hash
    monkeypatch.setattr(overlap, "_file_hash", lambda path: (read.append(Path(path).name), real(path))[1])
    items = {name: Item("q", (str(tmp_path / name),), name) for name in "abcd"}
    found = find_overlaps([items["a"], items["b"], items["c"]], {"": [items["d"]]})[""]
    assert (found.with_seen_image, sorted(read)) == (1, ["c", "d"])


def test_a_view_asks_only_for_its_own_records(tmp_path: Path, reads: list[int]) -> None:
    write(tmp_path / "a.jsonl", [record(question=f"Q{i}") for i in range(40)])
    dataset: PairDataset = open_pairs([SourceSpec(str(tmp_path / "a.jsonl"))])
    assert screen(dataset.select([5, 5, 2])).kept.tolist() == [0, 1, 2]
    assert reads == [2]
    assert len(screen(dataset).kept) == 40
    assert screen(dataset.select([7])).kept.tolist() == [0]
    assert reads == [2, 40]
    assert isinstance(dataset._files[0], sources._Source)


@pytest.mark.slow
def test_opening_data_imports_neither_pandas_nor_torch(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [record(question=f"<image>\nQ{i}", image=f"{i % 30}.png") for i in range(40)])
    for number in range(29):
        (tmp_path / f"{number}.png").write_bytes(b"%d" % number)
    script = f"""if True:
        import sys
        from vlmpo.data.dataset import open_pairs
        from vlmpo.data.index import store
        from vlmpo.data.index.filter import screen, split_hold_out
        from vlmpo.data.index.overlap import find_overlaps
        from vlmpo.data.readers.spec import SourceSpec
        store.MIN_BYTES = 0
        for _ in range(2):
            dataset = open_pairs([SourceSpec({str(path)!r})])
            train, held = split_hold_out(dataset, screen(dataset).kept, 0.2, 0)
            overlap = find_overlaps(dataset.select(train), {{"held": dataset.select(held)}})["held"]
            print(len(train) + len(held), overlap.with_seen_image, {{"pandas", "torch"}} & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "39 0 set()\n" * 2
    assert len(list(folder.glob("*.arrow"))) == 2
