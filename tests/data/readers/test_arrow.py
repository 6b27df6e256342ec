"""What records lie in: JSON arrays, Parquet, saved folders, folders laid out as on the Hub, Hub names."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data import drop_reasons
from tests.tiny_models import noise_image
from vlmpo.data.dataset import PairDataset, open_pairs
from vlmpo.data.formats import as_pairs
from vlmpo.data.index.filter import screen, split_hold_out
from vlmpo.data.index.overlap import Item, find_overlaps
from vlmpo.data.readers import json as json_reader
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import DataError, RecordError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `datasets` converts goes to a folder that goes again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise_image(20, 16, seed).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """RLAIF-V rows, each with an image of its own, embedded."""
    return [
        {
            "ds_name": "RLAIF-V",
            "image": {"bytes": png(seed), "path": f"{seed}.jpg"},
            "question": f"Q{seed}?",
            "chosen": f"good {seed}",
            "rejected": f"bad {seed}",
        }
        for seed in range(first, first + count)
    ]


def table(records: list[dict[str, Any]], **features: Any) -> datasets.Dataset:
    made = datasets.Dataset.from_list(records)
    for name, feature in features.items():
        made = made.cast_column(name, feature)
    return made


def opened(path: Any, **options: Any) -> PairDataset:
    return open_pairs([SourceSpec(str(path), **options)])


def chosen(data: PairDataset) -> list[str]:
    return [data[index].chosen for index in range(len(data))]


# --- JSON arrays


def array_of(folder: Path, text: str | bytes) -> PairDataset:
    (folder / "pairs.json").write_bytes(text.encode() if isinstance(text, str) else text)
    return opened(folder / "pairs.json")


def record(**changes: Any) -> dict[str, Any]:
    return {"question": "Q?", "chosen": "good", "rejected": "bad"} | changes


def test_lines_of_an_array(tmp_path: Path) -> None:
    text = (
        '\ufeff\n[\n{"question": "Q?", "chosen": "1",\n "rejected": "x"}, ' + json.dumps(record(chosen="2")) + ",\n\n"
    )
    text += (
        json.dumps(record(chosen='3 [}\\" ü'), indent=2, ensure_ascii=False) + "\n  ,\n" + json.dumps(record()) + "]\n"
    )
    data = array_of(tmp_path, text)
    assert chosen(data) == ["1", "2", '3 [}\\" ü', "good"]
    assert [data.origin(index) for index in range(4)] == [f"{tmp_path}/pairs.json:{line}" for line in (3, 4, 6, 12)]
    assert data.infos[0].container == "JSON array"
    assert data.paths == [f"{tmp_path}/pairs.json"]


BAD_RECORDS = [
    ("17", "bad_json", "the record holds a number; write a JSON object"),
    (r'{"question": "\ud83d", "chosen": "a", "rejected": "b"}', "bad_json", "surrogate"),
    (json.dumps(record(rejected="good")), "identical", "are the same"),
]


@pytest.mark.parametrize(("text", "reason", "detail"), BAD_RECORDS)
def test_bad_record_of_an_array(tmp_path: Path, text: str, reason: str, detail: str) -> None:
    data = array_of(tmp_path, f"[\n{json.dumps(record())},\n{text}\n,\n{json.dumps(record(chosen='after'))}]")
    with pytest.raises(RecordError) as caught:
        data[1]
    assert (caught.value.reason, detail in caught.value.detail) == (reason, True)
    assert caught.value.origin == f"{tmp_path}/pairs.json:3"
    assert data[2].chosen == "after"


GOOD = json.dumps(record())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"[{GOOD},\n{GOOD}",
            "pairs.json:2: not a valid JSON array (Expecting ',' or ']'): look for",
        ),
        (
            f"[{GOOD},\n{GOOD[:-1]},\n{GOOD}]",
            "pairs.json:3: not a valid JSON array (Expecting property name enclosed in double quotes); the "
            "last record begins in line 2: look for",
        ),
        (f"[{GOOD},\n{GOOD[:-2]}}}]", "pairs.json:2: not a valid JSON array (Unterminated string"),
        (f"[{GOOD}}},\n{GOOD}]", "pairs.json:1: not a valid JSON array (Expecting ',' or ']')"),
        (f"[{GOOD}]\n\n{GOOD}", "pairs.json:3: not a valid JSON array (the array ends before this)"),
        (f'[{GOOD},\n{{"question": }}\n,{GOOD}]', "pairs.json:2: not a valid JSON array (Expecting value)"),
        (f"[{GOOD},\n{GOOD} {GOOD}]", "pairs.json:2: not a valid JSON array (Expecting ',' or ']')"),
        (f"[{GOOD},\n\n,\n{GOOD}]", "pairs.json:3: not a valid JSON array (Expecting value)"),
        (f"[{GOOD},\n]", "pairs.json:2: not a valid JSON array (Expecting value)"),
        (f"[{GOOD},\n{'[' * 100_000}]", "pairs.json:2: not a valid JSON array (maximum recursion depth"),
        ("[", "pairs.json:1: not a valid JSON array (Expecting value): look for a bracket, brace, quote or comma"),
        ("[]", "no pair in "),
        ("[ \n ]", "no pair in "),
        ("", "cannot be read"),
    ],
)
def test_broken_arrays(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        array_of(tmp_path, text)
    assert message in str(caught.value)


def test_bytes_of_an_array_that_are_no_utf8_are_the_records_fault(tmp_path: Path) -> None:
    text = f"[{json.dumps(record())},\n{json.dumps(record(chosen='Größe'), ensure_ascii=False)}]"
    data = array_of(tmp_path, text.encode("latin-1"))
    assert data[0].chosen == "good"
    with pytest.raises(RecordError, match=r"pairs\.json:2: the record is not valid JSON in UTF-8"):
        data[1]


def test_an_array_too_large_to_be_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_reader, "MAX_ARRAY_BYTES", 100)
    assert len(array_of(tmp_path, f"[{GOOD}]")) == 1
    with pytest.raises(DataError, match=r"pairs\.json: a JSON array of 0\.0 GB, .* whole .*; write it as JSON Lines"):
        array_of(tmp_path, f"[{GOOD}, {GOOD}]")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\[]{},:\n ü', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(JSON, max_size=6), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_any_array_falls_into_its_items(
    tmp_path: Path, values: list[Any], indent: int | None, ascii_only: bool
) -> None:
    file = tmp_path / "any.json"
    file.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    places = json_reader.find_elements(str(file)).to_pylist()
    content = file.read_bytes()
    assert [json.loads(content[place["start"] : place["end"]]) for place in places] == values
    assert [place["line"] for place in places] == [content[: place["start"]].count(b"\n") + 1 for place in places]


# --- Parquet


def test_rlaif_v_parquet(tmp_path: Path) -> None:
    table(rows(3)).to_parquet(tmp_path / "RLAIF-V-Dataset_000.parquet")
    data = opened(tmp_path / "RLAIF-V-Dataset_000.parquet", max_tiles=4)
    assert data[1] == PreferencePair(
        prompt=(Message("user", "<image>\nQ1?"),),
        images=(png(1),),
        chosen="good 1",
        rejected="bad 1",
        source="RLAIF-V-Dataset_000",
        origin=f"{tmp_path}/RLAIF-V-Dataset_000.parquet:row 1",
        max_tiles=4,
        metadata={"ds_name": "RLAIF-V"},
    )
    info = data.infos[0]
    assert (info.container, info.format, info.records) == ("Parquet", "rlaif_v", 3)
    assert info.why == "has `question` (text), `chosen` (text), `rejected` (text), `image` (embedded)"
    assert data.paths == [f"{tmp_path}/RLAIF-V-Dataset_000.parquet"]


def test_rlhf_v_parquet_with_the_image_feature(tmp_path: Path) -> None:
    made = [
        {"image": row["image"], "text": json.dumps({key: row[key] for key in ("question", "chosen", "rejected")})}
        for row in rows(2)
    ]
    table(made, image=datasets.Image()).to_parquet(tmp_path / "v.parquet")
    data = opened(tmp_path / "v.parquet")
    assert data.infos[0].format == "rlhf_v"
    assert (data[1].images, data[1].chosen) == ((png(1),), "good 1")  # the bytes as they are, not decoded


def test_trl_parquet_with_messages_and_a_list_of_images(tmp_path: Path) -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "Q?"}]
    made = [
        {
            "images": [{"bytes": png(0), "path": None}],
            "prompt": [{"role": "user", "content": content}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "bad"}]}],
        },
    ]
    made.append({**made[0], "images": [], "prompt": [{"role": "user", "content": content[1:]}]})
    table(made, images=datasets.List(datasets.Image())).to_parquet(tmp_path / "t.parquet")
    data = opened(tmp_path / "t.parquet")
    assert data.infos[0].format == "trl"
    assert [(data[i].prompt[0].text, data[i].images) for i in (0, 1)] == [("<image>\nQ?", (png(0),)), ("Q?", ())]


def test_shards_of_a_glob_count_rows_by_file(tmp_path: Path) -> None:
    for shard, count in ((0, 2), (1, 3)):
        table(rows(count, 10 * shard)).to_parquet(tmp_path / f"train-{shard}.parquet")
    data = opened(tmp_path / "train-*.parquet")
    assert chosen(data) == [f"good {i}" for i in (0, 1, 10, 11, 12)]
    assert [data.origin(index) for index in (1, 2, 4)] == [
        f"{tmp_path}/train-0.parquet:row 1",
        f"{tmp_path}/train-1.parquet:row 0",
        f"{tmp_path}/train-1.parquet:row 2",
    ]
    assert (data.source_names, data.infos[0].container) == (["train"], "Parquet, 2 files")
    assert data.paths == [f"{tmp_path}/train-{shard}.parquet" for shard in (0, 1)]


def test_bad_rows_are_named(tmp_path: Path) -> None:
    made = rows(4)
    made[1]["rejected"] = made[1]["chosen"]
    made[2]["chosen"] = None
    made[3]["image"] = {"bytes": None, "path": "gone.png"}
    table(made).to_parquet(tmp_path / "p.parquet")
    result = screen(opened(tmp_path / "p.parquet"))
    assert [(drop.origin, drop.reason) for drop in result.dropped] == [
        (f"{tmp_path}/p.parquet:row 1", "identical"),
        (f"{tmp_path}/p.parquet:row 2", "missing_field"),
        (f"{tmp_path}/p.parquet:row 3", "missing_image"),
    ]
    assert f"image {tmp_path}/gone.png does not exist" in result.dropped[2].detail


def test_files_that_are_no_parquet_or_empty(tmp_path: Path) -> None:
    (tmp_path / "no.parquet").write_text("text")
    with pytest.raises(DataError, match=r"no\.parquet: cannot be read \(ArrowInvalid: "):
        opened(tmp_path / "no.parquet")
    table(rows(1)).select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no pair in"):
        opened(tmp_path / "empty.parquet")


@pytest.mark.slow
def test_tables_in_other_processes(tmp_path: Path) -> None:
    table(rows(3)).to_parquet(tmp_path / "p.parquet")
    data = opened(tmp_path / "p.parquet").select([2, 0])
    expected = [data[0], data[1]]
    again = pickle.loads(pickle.dumps(data))
    assert ([again[0], again[1]], again.origin(0)) == (expected, f"{tmp_path}/p.parquet:row 2")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(data.__getitem__, range(2)) == expected


TEXT = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@st.composite
def records(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Records of one shape, as TRL has them, some of them bad."""

    def conversation(last: str) -> list[dict[str, str]]:
        turns = [{"role": "system", "content": draw(TEXT)}] * draw(st.integers(0, 1))
        return [*turns, {"role": "user", "content": last}]

    made = []
    for _ in range(draw(st.integers(1, 5))):
        images = draw(st.lists(st.sampled_from(["a.png", "b.png"]), max_size=2))
        made.append(
            {
                "prompt": conversation(draw(TEXT) + "<image>" * draw(st.sampled_from([0, len(images)]))),
                "chosen": [{"role": draw(st.sampled_from(["assistant", "assistant", "user"])), "content": draw(TEXT)}],
                "rejected": [{"role": "assistant", "content": draw(TEXT)}],
                "images": images,
                "score": draw(st.none() | st.integers(-5, 5)),
            }
        )
    return made


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=records())
def test_lines_array_and_parquet_hold_the_same_pairs(tmp_path: Path, made: list[dict[str, Any]]) -> None:
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, made)))
    (tmp_path / "p.json").write_text(json.dumps(made))
    features = datasets.Features(
        {
            **{
                key: [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
                for key in ("prompt", "chosen", "rejected")
            },
            "images": [datasets.Value("string")],
            "score": datasets.Value("int64"),
        }
    )
    datasets.Dataset.from_list(made, features=features).to_parquet(tmp_path / "p.parquet")
    found = [read_all(opened(tmp_path / f"p.{kind}", format="trl")) for kind in ("jsonl", "json", "parquet")]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(made)


def read_all(data: PairDataset) -> list[Any]:
    """Every pair without its origin; of a bad one the reason and detail."""
    found: list[Any] = []
    for index in range(len(data)):
        try:
            pair = data[index]
            found.append((pair.prompt, pair.images, pair.chosen, pair.rejected, pair.metadata))
        except RecordError as error:
            found.append((error.reason, error.detail))
    return found


# --- saved folders, folders laid out as on the Hub


def test_a_saved_data_set(tmp_path: Path) -> None:
    table(rows(3), image=datasets.Image()).save_to_disk(tmp_path / "saved")
    data = opened(tmp_path / "saved")
    assert (data[2].images, data[2].origin) == ((png(2),), f"{tmp_path}/saved:row 2")
    assert (data.source_names, data.infos[0].container) == (["saved"], "saved datasets folder")
    assert all(Path(path).suffix == ".arrow" for path in data.paths)
    with pytest.raises(DataError, match="split: one data set without splits is saved here; leave out 'train'"):
        opened(tmp_path / "saved", split="train")
    with pytest.raises(DataError, match="subset: has no effect here"):
        opened(tmp_path / "saved", subset="a")


def test_a_saved_dict_of_data_sets(tmp_path: Path) -> None:
    splits = {"train": table(rows(2)), "test": table(rows(1, 5))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    data = opened(tmp_path / "both", split="test")
    assert (chosen(data), data.origin(0)) == (["good 5"], f"{tmp_path}/both[test]:row 0")
    assert (data.source_names, data.infos[0].container) == (["both/test"], "saved datasets folder, split test")
    with pytest.raises(DataError, match=r"both: name one under `split`; its splits are train, test"):
        opened(tmp_path / "both")
    with pytest.raises(DataError, match=r"both: split: there is no 'dev'; its splits are train, test"):
        opened(tmp_path / "both", split="dev")
    datasets.DatasetDict({"train": splits["train"]}).save_to_disk(tmp_path / "one")
    assert chosen(opened(tmp_path / "one")) == ["good 0", "good 1"]


def hub_like(folder: Path) -> Path:
    """A clone of a Hub repository with two splits."""
    (folder / "data").mkdir(parents=True)
    table(rows(2)).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    table(rows(1, 5)).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def test_a_folder_laid_out_as_on_the_hub(tmp_path: Path) -> None:
    folder = hub_like(tmp_path / "repo")
    with pytest.raises(DataError, match=r"repo: name one under `split`; its splits are train, test"):
        opened(folder)
    data = opened(folder, split="train")
    assert (chosen(data), data.origin(1)) == (["good 0", "good 1"], f"{folder}[train]:row 1")
    assert (data.source_names, data.infos[0].container) == (["repo/train"], "folder, split train")
    assert data[0].images == (png(0),)
    with pytest.raises(DataError, match=r"repo: cannot be read \(ValueError: .*dev"):
        opened(folder, split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: cannot be read"):
        opened(tmp_path / "empty")


def test_a_folder_of_shards_of_one_split(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        table(rows(2, 10 * shard)).to_parquet(tmp_path / "shards" / f"part-{shard}.parquet")
    assert chosen(opened(tmp_path / "shards")) == ["good 0", "good 1", "good 10", "good 11"]


def test_subsets_of_a_folder(tmp_path: Path) -> None:
    for subset in ("charts", "photos"):
        (tmp_path / "repo" / subset).mkdir(parents=True)
        table([record(chosen=subset)]).to_parquet(tmp_path / "repo" / subset / "train.parquet")
    (tmp_path / "repo" / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: charts, data_files: charts/*.parquet}\n"
        "- {config_name: photos, data_files: photos/*.parquet}\n---\n"
    )
    data = opened(tmp_path / "repo", subset="photos")
    assert (chosen(data), data.infos[0].container) == (["photos"], "folder, subset photos, split train")
    with pytest.raises(DataError, match=r"repo: cannot be read \(ValueError: .*charts"):
        opened(tmp_path / "repo")


def test_a_folder_of_images_with_their_records(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    for seed in range(2):
        (tmp_path / "pics" / f"{seed}.png").write_bytes(png(seed))
    lines = [{"file_name": f"{seed}.png", **record(chosen=f"good {seed}")} for seed in range(2)]
    (tmp_path / "pics" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = opened(tmp_path / "pics")
    assert {pair.chosen: pair.images for pair in (data[0], data[1])} == {
        f"good {seed}": (f"{tmp_path}/pics/{seed}.png",) for seed in range(2)
    }
    assert drop_reasons(data) == []


def test_json_values_of_a_table_are_read_as_values(tmp_path: Path) -> None:
    """`datasets` stores what has no one type as text of JSON."""
    (tmp_path / "repo").mkdir()
    mixed = [
        {"prompt": [{"role": "user", "content": "Q?"}], "chosen": "good", "rejected": "bad"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "P?"}]}], "chosen": "a", "rejected": "b"},
    ]
    (tmp_path / "repo" / "train.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    data = opened(tmp_path / "repo")
    assert [data[index].prompt[0].text for index in range(2)] == ["Q?", "P?"]


# --- Hub names


def test_a_hub_name_is_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's part is played by a local folder: the names go through to `datasets` as they are written."""
    folder = hub_like(tmp_path / "repo")
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    real_splits, real_load = datasets.get_dataset_split_names, datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "get_dataset_split_names",
        lambda name, subset: (asked.append((name, subset)), real_splits(str(folder)))[1],
    )
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, subset, split: (asked.append((name, subset, split)), real_load(str(folder), split=split))[1],
    )
    data = opened("org/name", split="test", subset="charts")
    assert asked == [("org/name", "charts", "test")]
    assert (chosen(data), data.origin(0)) == (["good 5"], "org/name/charts[test]:row 0")
    assert data.infos[0].container == "Hub data set, subset charts, split test"
    assert data.source_names == ["name/test"]
    with pytest.raises(DataError, match="org/name: name one under `split`; its splits are train, test"):
        opened("org/name")
    assert asked[-1] == ("org/name", None)


def test_a_hub_name_that_cannot_be_loaded_may_have_been_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'data/pairs' on the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(DataError) as caught:
        opened("data/pairs")
    assert str(caught.value) == (
        f"data/pairs: neither a file nor a folder here ({tmp_path}/data/pairs), and as a data set of the Hub: "
        "cannot be read (ConnectionError: Couldn't reach 'data/pairs' on the Hub)"
    )


@pytest.mark.parametrize("path", ["data/pairs.jsonl", "./data/pairs", "/data/pairs", "a/b/c", "pairs"])
def test_what_looks_like_a_path_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(DataError, match=r"no such file; looked for|no \.jsonl, \.json, \.parquet file and no folder"):
        opened(path)


# --- hold-out and overlap of embedded images


def test_embedded_images_are_held_out_by_content(tmp_path: Path) -> None:
    made = rows(12)
    for index, row in enumerate(made):
        row["image"] = {"bytes": png(index % 4), "path": f"{index}.jpg"}  # four images under twelve names
    table(made).to_parquet(tmp_path / "p.parquet")
    data = opened(tmp_path / "p.parquet")
    train, held = split_hold_out(data, np.arange(12), 0.25, 0)
    assert (len(train), len(held)) == (9, 3)
    assert len({index % 4 for index in held}) == 1


def test_text_only_pairs_under_one_system_prompt_are_not_one_group(tmp_path: Path) -> None:
    made = [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Q{index}?"}],
            "chosen": "good",
            "rejected": "bad",
        }
        for index in range(8)
    ]
    (tmp_path / "p.json").write_text(json.dumps(made))
    train, held = split_hold_out(opened(tmp_path / "p.json"), np.arange(8), 0.25, 0)
    assert (len(train), len(held)) == (6, 2)


def test_overlap_reads_its_items_once() -> None:
    class Items(list):
        times = 0

        def __iter__(self) -> Iterator[Item]:
            self.times += 1
            return super().__iter__()

    training, evaluation = Items([Item("q", (b"one",), "a")]), Items([Item("p", (b"one",), "b"), Item("q", (), "c")])
    found = find_overlaps(training, {"eval": evaluation})["eval"]
    assert (found.items, found.with_seen_image, found.seen_whole) == (2, 1, 0)
    assert (training.times, evaluation.times) == (1, 1)


# --- datasets handed to a trainer


def test_a_datasets_dataset_as_pairs() -> None:
    data = table(rows(3), image=datasets.Image())
    pairs = as_pairs(data)
    assert pairs[1] == PreferencePair(
        prompt=(Message("user", "<image>\nQ1?"),),
        images=(png(1),),
        chosen="good 1",
        rejected="bad 1",
        origin="train_dataset[1]",
        metadata={"ds_name": "RLAIF-V"},
    )
    assert pickle.loads(pickle.dumps(pairs))[1] == pairs[1]
    with pytest.raises(DataError, match=r"holds several data sets \(train\)"):
        as_pairs(datasets.DatasetDict({"train": data}))
    with pytest.raises(DataError, match="IterableDataset has no length"):
        as_pairs(data.to_iterable_dataset())


def test_a_transform_of_the_datasets_own_is_kept() -> None:
    data = table(rows(2), image=datasets.Image())
    changed = data.with_transform(lambda batch: {**batch, "chosen": [text.upper() for text in batch["chosen"]]})
    pair = as_pairs(changed)[1]
    assert (pair.chosen, isinstance(pair.images[0], Image.Image)) == ("GOOD 1", True)
