"""Data in every format through the command line: what `inspect` says, what `train` writes, how a bad record ends it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.commands.test_train import call, manifest, write_recipe
from tests.data.formats.test_formats import SAME, said
from tests.tiny_models import model, noise_image, processor
from vlmpo.recipe_yaml import load_recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_formats(folder: Path) -> list[dict[str, Any]]:
    """One source a format, each with two records and one of them bad; the images they name."""
    for number, image in enumerate(("a.png", "b.png")):
        noise_image(60, 50, number).save(folder / image)
    sources = []
    for name, record in SAME.items():
        stem = name.replace(" ", "_")
        lines = [json.dumps(record), json.dumps({**record, "image": None, "images": ["gone.png"]})]
        (folder / f"{stem}.jsonl").write_text("\n".join(lines))
        sources.append({"path": f"{stem}.jsonl"})
    return sources


BAD = {
    "mmpr": {"rejected": "the colour is green"},
    "trl": {"chosen": [said("user", "me again")]},
    "trl strings": {"chosen": ""},
    "trl_implicit": {"rejected": [said("user", "another?"), said("assistant", "not blue")]},
    "rlhf_v": {"text": "{"},
    "sharegpt": {"conversations": [{"from": "observation", "value": "4"}]},
    "alpaca": {"instruction": "<image><image>"},
    "swift": {"rejected_response": None},
}
REASONS = {
    "mmpr": "identical",
    "trl": "bad_conversation",
    "trl strings": "empty_response",
    "trl_implicit": "prompts_differ",
    "rlhf_v": "bad_json",
    "sharegpt": "bad_conversation",
    "alpaca": "placeholder_mismatch",
    "swift": "missing_field",
}


@pytest.mark.parametrize("name", list(SAME))
def test_a_bad_record_ends_it_when_asked(tmp_path: Path, checkpoint: Path, name: str) -> None:
    noise_image(60, 50, 0).save(tmp_path / "a.png")
    (tmp_path / "p.json").write_text(f"[{json.dumps(SAME[name])},\n{json.dumps({**SAME[name], **BAD[name]})}]")
    recipe = write_recipe(tmp_path, checkpoint, data={"train": ["p.json"], "on_bad_record": "fail"})
    result = call("inspect", recipe)
    assert result.exit_code == 2, result.output
    assert f"error: {tmp_path / 'p.json'}:2: " in result.output
    assert f"[{REASONS[name]}]" in result.output
    assert "Traceback" not in result.output
    skipped = call("inspect", recipe, "data.on_bad_record=skip")
    assert skipped.exit_code == 0, skipped.output
    assert f"{REASONS[name]}: {tmp_path / 'p.json'}:2: " in skipped.output


def test_a_bad_row_of_a_table_ends_it_when_asked(tmp_path: Path, checkpoint: Path) -> None:
    image = (noise_image(60, 50, 0).save(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes())[1]
    rows = [{"image": {"bytes": data}, "question": "Q?", "chosen": "a", "rejected": "b"} for data in (image, b"no png")]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    recipe = write_recipe(tmp_path, checkpoint, data={"train": ["p.parquet"], "on_bad_record": "fail"})
    result = call("train", recipe)
    assert result.exit_code == 2, result.output
    assert f"{tmp_path / 'p.parquet'}:row 1: image <6 bytes> cannot be used" in result.output
    assert "[undecodable_image]" in result.output


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such", "no/such: neither a file nor a folder here"),
        ({"path": "p.jsonl", "format": "tlr"}, "data.train.0.format: expected"),
        ({"path": "p.jsonl", "split": "train"}, "split: has no effect on a file"),
        ("p.jsonl", "its first records hold `win`, `lose`, which fits no format"),
    ],
)
def test_mistakes_get_one_message(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, source: Any, words: str
) -> None:
    def unreachable(*_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    (tmp_path / "p.jsonl").write_text('{"win": "a", "lose": "b"}')
    result = call("inspect", write_recipe(tmp_path, checkpoint, data={"train": [source]}))
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_inspect_says_which_format_and_why(tmp_path: Path, checkpoint: Path) -> None:
    sources = write_formats(tmp_path)
    recipe = write_recipe(tmp_path, checkpoint, data={"train": sources, "eval": ["trl.jsonl"]})
    result = call("inspect", recipe, "--pairs", "0")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "data.train"
    assert lines[2] == (
        "  trl: 2 records, JSON Lines, TRL, explicit prompt: has `prompt` (messages), `chosen` (messages), "
        "`rejected` (messages), `images` (text, a list)"
    )
    assert [line.split(":")[0].strip() for line in lines[1:9]] == [name.replace(" ", "_") for name in SAME]
    assert lines[9:11] == ["data.eval", lines[2]]


@pytest.mark.slow
def test_training_on_every_format_at_once(tmp_path: Path, checkpoint: Path) -> None:
    sources = write_formats(tmp_path)
    rows = [json.loads((tmp_path / "mmpr.jsonl").read_text().splitlines()[0])] * 2
    embedded = [{**row, "image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}} for row in rows]
    datasets.Dataset.from_list(embedded).to_parquet(tmp_path / "shard-0.parquet")
    datasets.Dataset.from_list(embedded).save_to_disk(tmp_path / "saved")
    sources += [{"path": "shard-*.parquet", "name": "rlaif"}, {"path": "saved"}]
    recipe = write_recipe(tmp_path, checkpoint, data={"train": sources})
    assert load_recipe(recipe).data.train[-2].path == str(tmp_path / "shard-*.parquet")  # below the recipe's own folder
    result = call("train", recipe, "training.dataloader_num_workers=1")
    assert result.exit_code == 0, result.output
    found = manifest(tmp_path)["data"]
    names = [name.replace(" ", "_") for name in SAME]
    for name in names:
        assert found["sets"][name] == {
            "read": 2,
            "used": 1,
            "held_out": 0,
            "dropped": {"missing_image": 1},
            "not_reached": 0,
        }
    assert (found["sets"]["rlaif"]["used"], found["sets"]["saved"]["used"]) == (2, 2)
    assert [(entry["name"], entry["format"], entry["container"]) for entry in found["formats"]["train"]] == [
        *((name.replace(" ", "_"), name.removesuffix(" strings"), "JSON Lines") for name in SAME),
        ("rlaif", "rlaif_v", "Parquet"),
        ("saved", "rlaif_v", "saved datasets folder"),
    ]
    assert str(tmp_path / "shard-0.parquet") in found["hashes"]


@pytest.mark.slow
def test_fine_tuning_data_without_a_rejected_response(tmp_path: Path, checkpoint: Path) -> None:
    noise_image(60, 50, 0).save(tmp_path / "a.png")
    question, answer = said("user", "<image>what colour?"), said("assistant", "red")
    written = {
        "messages": {"messages": [question, answer], "images": ["a.png"]},
        "llava": {
            "conversations": [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "red"}],
            "image": "a.png",
        },
        "alpaca": {"instruction": "what colour?", "output": "red"},
        "completion": {"prompt": [question], "completion": [answer], "image": "a.png"},
        "mmpr": {"question": "what colour?", "chosen": "red", "image": "a.png"},
    }
    for name, record in written.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
    recipe = write_recipe(
        tmp_path, checkpoint, data={"train": [f"{name}.jsonl" for name in written]}, loss={"weights": {"nll": 1.0}}
    )
    result = call("train", recipe)
    assert result.exit_code == 0, result.output
    assert {name: counts["used"] for name, counts in manifest(tmp_path)["data"]["sets"].items()} == dict.fromkeys(
        written, 1
    )
    refused = call("inspect", recipe, "loss.weights={sigmoid: 1.0, nll: 1.0}")
    assert refused.exit_code == 2
    assert "none is left to train on (5 missing_field)" in refused.output
