"""LLaMA-Factory's dataset_info.json: its data sets, their columns and the speakers of their messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.tiny_models import noise_image
from vlmpo.data import dataset as dataset_module
from vlmpo.data.dataset import PairDataset, open_pairs
from vlmpo.data.readers.spec import SourceSpec, file_specs
from vlmpo.data.records import Message
from vlmpo.errors import DataError, RecordError

ALPACA = {"q": "Describe <image>", "more": "in one word", "good": "red", "bad": "blue", "pics": ["a.png"]}
COLUMNS = {"prompt": "q", "query": "more", "chosen": "good", "rejected": "bad", "images": "pics"}
SPOKEN = {
    "conv": [
        {"who": "S", "says": "Be brief."},
        {"who": "U", "says": "Hi"},
        {"who": "A", "says": "Yes?"},
        {"who": "U", "says": "Q?"},
    ],
    "good": {"who": "A", "says": "red"},
    "bad": {"who": "A", "says": "blue"},
}
TAGS = {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A", "system_tag": "S"}
SPOKEN_ENTRY = {
    "file_name": "p.json",
    "formatting": "sharegpt",
    "ranking": True,
    "columns": {"messages": "conv", "chosen": "good", "rejected": "bad"},
    "tags": TAGS,
}


def write(place: Path, records: list[dict[str, Any]], *, name: str = "p.json", **entries: Any) -> str:
    noise_image(20, 20, 0).save(place / "a.png")
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    (place / name).write_text(text)
    (place / "dataset_info.json").write_text(json.dumps(entries))
    return str(place / "dataset_info.json")


def opened(path: str, need_rejected: bool = True, **options: Any) -> PairDataset:
    return open_pairs([SourceSpec(path, **options)], need_rejected=need_rejected)


def test_alpaca_columns(tmp_path: Path) -> None:
    path = write(tmp_path, [{**ALPACA, "id": 3}], mine={"file_name": "p.json", "ranking": True, "columns": COLUMNS})
    for named in (path, str(tmp_path)):
        data = opened(named)
        pair = data[0]
        assert pair.prompt == (Message("user", "Describe <image>\nin one word"),)
        assert (pair.images, pair.chosen, pair.rejected) == ((f"{tmp_path}/a.png",), "red", "blue")
        assert (pair.source, pair.origin, pair.metadata) == ("mine", f"{tmp_path}/p.json:1", {"id": 3})
        assert (data.infos[0].format, data.infos[0].why) == ("alpaca", "as dataset_info.json says")


def test_sharegpt_columns_and_tags(tmp_path: Path) -> None:
    pair = opened(write(tmp_path, [SPOKEN], mine=SPOKEN_ENTRY))[0]
    assert pair.prompt == (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Yes?"),
        Message("user", "Q?"),
    )
    assert (pair.chosen, pair.rejected) == ("red", "blue")


def test_messages_without_tags_and_systems(tmp_path: Path) -> None:
    record = {
        "conv": [{"from": "human", "value": "<video>Q?"}],
        "good": "red",
        "bad": {"from": "gpt", "value": "blue"},
        "sys": "Be brief.",
        "clips": ["v.mp4"],
    }
    columns = {"messages": "conv", "chosen": "good", "rejected": "bad", "system": "sys", "videos": "clips"}
    entry = {**SPOKEN_ENTRY, "columns": columns, "tags": None}
    pair = opened(write(tmp_path, [record], mine=entry))[0]
    assert (pair.prompt[0], pair.videos, pair.chosen) == (
        Message("system", "Be brief."),
        (f"{tmp_path}/v.mp4",),
        "red",
    )


def test_without_columns_the_keys_are_their_own(tmp_path: Path) -> None:
    record = {"instruction": "Q?", "input": "", "chosen": "red", "rejected": "blue", "history": [["Hi", "Yes?"]]}
    pair = opened(write(tmp_path, [record], mine={"file_name": "p.json", "ranking": True}))[0]
    assert ([turn.text for turn in pair.prompt], pair.chosen) == (["Hi", "Yes?", "Q?"], "red")


def test_entries_that_are_not_for_ranking(tmp_path: Path) -> None:
    records = [{"q": "Q?", "a": "red"}]
    entries = {
        "sft": {"file_name": "s.jsonl", "columns": {"prompt": "q", "response": "a"}},
        "mine": SPOKEN_ENTRY,
    }
    (tmp_path / "s.jsonl").write_text(json.dumps(records[0]))
    path = write(tmp_path, [SPOKEN], **entries)
    data = opened(path)
    assert (data.source_names, len(data)) == (["mine"], 1)
    assert data.notices == [f"{path}: entry 'sft': has no `ranking`, so no rejected responses, and is left out"]
    tuned = opened(path, need_rejected=False)
    assert [(pair.source, pair.chosen, pair.rejected) for pair in (tuned[0], tuned[1])] == [
        ("sft", "red", None),
        ("mine", "red", None),
    ]
    with pytest.raises(DataError, match="no entry has `ranking`"):
        opened(path, subset="sft")
    assert opened(path, need_rejected=False, subset="sft").source_names == ["sft"]
    with pytest.raises(DataError, match="subset: there is no entry 'x'; its entries are sft, mine"):
        opened(path, subset="x")


def test_num_samples_and_repeat(tmp_path: Path) -> None:
    records = [{**ALPACA, "more": str(at)} for at in range(10)]
    entry = {"file_name": "p.jsonl", "ranking": True, "columns": COLUMNS}
    path = write(tmp_path, records, name="p.jsonl", few={**entry, "num_samples": 4}, many={**entry, "num_samples": 25})
    data = opened(path)
    counts = [sum(data.source(index) == name for index in range(len(data))) for name in ("few", "many")]
    assert counts == [4, 25]
    assert len(opened(path, subset="few", repeat=2.0)) == 8


def test_folders_splits_and_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_list([ALPACA])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "p.parquet")
    (tmp_path / "folder").mkdir()
    rows.to_json(tmp_path / "folder" / "train.jsonl")
    base = {"ranking": True, "columns": COLUMNS}
    path = write(
        tmp_path,
        [ALPACA],
        saved={**base, "file_name": "saved", "split": "test"},
        table={**base, "file_name": "p.parquet"},
        folder={**base, "file_name": "folder"},
    )
    data = opened(path, image_root=str(tmp_path))
    assert [info.container for info in data.infos] == [
        "saved datasets folder, split test",
        "Parquet",
        "folder, split train",
    ]
    assert {data[index].chosen for index in range(3)} == {"red"}
    assert {data[index].images for index in range(3)} == {(f"{tmp_path}/a.png",)}


def test_entries_of_the_hub_go_the_way_of_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"hf_hub_url": "org/name", "ms_hub_url": "x/y", "subset": "en", "folder": "data", "ranking": True}
    path = write(tmp_path, [ALPACA], a=entry, b={**entry, "split": "test", "columns": COLUMNS})
    (first, second) = file_specs(SourceSpec(path), [])
    assert (first.kind, first.path, first.subset, first.split, first.folder) == (
        "hub",
        "org/name",
        "en",
        "train",
        "data",
    )
    assert (second.split, second.format, second.image_root) == ("test", "alpaca", str(tmp_path))
    asked: list[Any] = []

    def load_named(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        raise DataError("not here")

    monkeypatch.setattr(dataset_module, "load_named", load_named)
    with pytest.raises(DataError, match="not here"):
        opened(path)
    assert asked == [(("org/name", "en", "train"), {"is_folder": False, "files_in": "data"})]


def test_unknown_keys_are_told_of(tmp_path: Path) -> None:
    columns, tags = {**SPOKEN_ENTRY["columns"], "image": "pics"}, {**TAGS, "user": "U"}
    path = write(tmp_path, [SPOKEN], mine={**SPOKEN_ENTRY, "columns": columns, "tags": tags, "rankings": True})
    where = f"{path}: entry 'mine'"
    assert opened(path).notices == [
        f"{where}: key 'rankings' is not known and has no effect; did you mean 'ranking'?",
        f"{where}: columns: key 'image' is not known and has no effect; did you mean 'images'?",
        f"{where}: tags: key 'user' is not known and has no effect; did you mean 'user_tag'?",
    ]


def test_keys_that_no_column_names_are_not_lost(tmp_path: Path) -> None:
    entry = {"file_name": "p.json", "ranking": True, "columns": {**COLUMNS, "images": None}}
    path = write(tmp_path, [ALPACA, {**ALPACA, "q": "Q?", "chosen": "mine"}], mine=entry)
    with pytest.raises(RecordError) as caught:
        opened(path)[0]
    assert (caught.value.reason, "`pics` seems to hold" in caught.value.detail) == ("unread_media", True)
    path = write(tmp_path, [{**ALPACA, "chosen": "mine"}], mine={**entry, "columns": COLUMNS})
    assert (opened(path)[0].chosen, opened(path)[0].metadata) == ("red", {"chosen (not mapped)": "mine"})


def test_records_that_lack_a_column_name_it(tmp_path: Path) -> None:
    entry = {"file_name": "p.json", "ranking": True, "columns": COLUMNS}
    path = write(tmp_path, [{**ALPACA}, {key: ALPACA[key] for key in ("q", "good", "pics")}], mine=entry)
    with pytest.raises(RecordError) as caught:
        opened(path)[1]
    assert (caught.value.reason, caught.value.detail) == (
        "missing_field",
        "`bad` is missing, which dataset_info.json names as the column of `rejected`",
    )
    assert opened(path, need_rejected=False)[1].chosen == "red"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "none.json"}, "no such file; looked for .*none.json; to read other entries, name each under"),
        ({"file_name": "p.csv"}, "p.csv: no .jsonl, .json, .parquet file"),
        ({"file_name": 3}, "file_name must be a text, not a number"),
        ({"ms_hub_url": "a/b"}, "has `ms_hub_url`; vlmpo reads `file_name` and `hf_hub_url`"),
        ({"script_url": "a"}, "has `script_url`"),
        ({"cloud_file_name": "s3://a"}, "has `cloud_file_name`"),
        ({"file_name": "p.json", "formatting": "chatml"}, "formatting 'chatml' is not known; known are alpaca"),
        ({"file_name": "p.json", "ranking": "yes"}, "ranking must be true or false"),
        ({"file_name": "p.json", "num_samples": 0}, "num_samples must be a whole number from 1 up"),
        ({"file_name": "p.json", "columns": ["a"]}, "columns must be an object, not a list"),
        ({"file_name": "p.json", "columns": {"prompt": 3}}, "columns: prompt must be a text"),
    ],
)
def test_entries_that_cannot_be_used(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    path = write(tmp_path, [ALPACA], mine={"ranking": True, **entry})
    with pytest.raises(DataError, match=message) as caught:
        opened(path)
    assert str(caught.value).startswith(f"{path}: entry 'mine': ")


def test_settings_that_have_no_effect_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [SPOKEN], mine=SPOKEN_ENTRY)
    with pytest.raises(DataError, match=r"format: dataset_info\.json says it of each entry; leave out 'trl'"):
        opened(path, format="trl")
    with pytest.raises(DataError, match="split: has no effect on a file"):
        opened(path, split="train")


def test_a_folder_of_datasets_is_still_one(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"question": "Q?", "chosen": "a", "rejected": "b"}]).save_to_disk(tmp_path / "saved")
    assert (tmp_path / "saved" / "dataset_info.json").exists()
    assert opened(str(tmp_path / "saved")).infos[0].container == "saved datasets folder"
