"""``vlmpo init``: the recipe it writes for what it finds, and what it says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tiny_models import model, noise_image, processor, random_pair
from vlmpo.cli import app
from vlmpo.commands import init_fit
from vlmpo.commands.inspect_memory import MemoryEstimate
from vlmpo.commands.run_data import open_run_data
from vlmpo.recipe import Recipe
from vlmpo.recipe_yaml import load_recipe
from vlmpo.train.memory_choice import MemoryChoice
from vlmpo.tree.packing import RowBound


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: twelve images in ``photos``, beside which the tests put their data."""
    (tmp_path / "photos").mkdir()
    for seed in range(12):
        noise_image(40, 40, seed).save(tmp_path / "photos" / f"{seed}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(count: int = 24) -> list[dict[str, Any]]:
    pairs = [(f"{seed % 12}.png", random_pair(seed)) for seed in range(count)]
    return [{"image": i, "question": p.prompt[0].text, "chosen": p.chosen, "rejected": p.rejected} for i, p in pairs]


def like_trl(record: dict[str, Any]) -> dict[str, Any]:
    turns = {key: [{"role": "assistant", "content": record[key]}] for key in ("chosen", "rejected")}
    return {"images": [record["image"]], "prompt": [{"role": "user", "content": record["question"]}], **turns}


def like_sft(record: dict[str, Any]) -> dict[str, Any]:
    turns = [("user", record["question"]), ("assistant", record["chosen"])]
    return {"images": [record["image"]], "messages": [{"role": role, "content": text} for role, text in turns]}


def write(path: str, lines: Iterable[Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def init(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["init", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def recipe(name: str = "recipe.yaml") -> Recipe:
    return load_recipe(name)


# ---- data ----


def test_pairs_and_model_are_found_and_the_recipe_fits_them(here: Path, checkpoint: Path) -> None:
    """Nothing is named: the folder holds a checkpoint, an MMPR set, and files that are no data."""
    (here / "tiny").symlink_to(checkpoint)
    write("set/pairs.jsonl", records())
    Path("set/meta.json").write_text(json.dumps({"noise": {"root": "photos", "annotation": "set/pairs.jsonl"}}))
    Path("package.json").write_text('{"name": "x", "version": 1}')
    Path("notes.jsonl").write_text("")
    said = init()
    found = recipe()
    assert found.model.path == str(here / "tiny")
    assert [source.path for source in found.data.train] == [str(here / "set" / "meta.json")]
    data = open_run_data(found)
    assert len(data.train) + len(data.evaluation["held_out"]) == 24
    assert (found.data.max_length, found.data.max_tiles, found.model.lora) == (256, 2, None)
    assert found.training["per_device_train_batch_size"] * found.training["gradient_accumulation_steps"] == 8
    steps = "num_train_epochs: 3 # 9 steps in all"  # of 24 pairs 10 % and whole images are held out
    assert steps in Path("recipe.yaml").read_text()
    assert "set/meta.json: MMPR, 24 usable pairs" in said
    assert [line.strip() for line in said.splitlines()[-3:]] == [
        "vlmpo inspect recipe.yaml",
        "vlmpo train recipe.yaml",
        "vlmpo evaluate recipe.yaml",
    ]
    before = Path("recipe.yaml").read_bytes()
    assert "is there already" in init(code=2)
    assert Path("recipe.yaml").read_bytes() == before


def test_images_elsewhere_and_a_test_file_are_found(here: Path) -> None:
    write("trl/train.jsonl", map(like_trl, records()))
    write("trl/test.jsonl", map(like_trl, records(4)))
    write("trl/old.jsonl", map(like_trl, records(6)))
    said = init("--data", "trl", "--output", "r.yaml")
    found = recipe("r.yaml")
    (train,), (evaluated,) = found.data.train, found.data.eval
    assert (train.path, train.image_root) == (str(here / "trl" / "train.jsonl"), str(here / "photos"))
    assert evaluated.path == str(here / "trl" / "test.jsonl")
    assert found.data.hold_out == 0
    assert "left aside: trl/old.jsonl (6 pairs)" in said
    assert "fill in model.path" in said  # no model is here
    assert found.model.path == "PATH-OF-YOUR-MODEL"


def test_data_without_rejected_responses_are_examples(here: Path) -> None:
    write("sft.jsonl", map(like_sft, records()))
    assert "no record has a rejected response" in init("--data", "sft.jsonl")
    assert recipe().loss.weights == {"nll": 1.0}


@pytest.mark.parametrize("answer", ["7", None])
def test_of_questions_pairs_are_made_first(here: Path, answer: str | None) -> None:
    lines = [{k: r[k] for k in ("image", "question")} | ({"answer": answer} if answer else {}) for r in records()]
    write("q.jsonl", [{**line, "split": "train" if i % 4 else "test"} for i, line in enumerate(lines)])
    said = init("--data", "q.jsonl")
    found = recipe()
    assert found.build is not None
    assert (found.build.split, found.build.image_root) == ("train", str(here / "photos"))
    kind = "correctness" if answer else "dropout_ntp"
    assert found.data.train[0].path == f"runs/recipe/build/pairs_{kind}.jsonl"
    commands = [line.strip() for line in said.splitlines() if line.startswith("  vlmpo")]
    assert commands[:2] == ["vlmpo sample recipe.yaml", f"vlmpo pair {kind.replace('_', '-')} recipe.yaml"]
    assert found.evaluate is not None
    assert found.evaluate.split == "test"


def test_what_is_not_found_is_a_placeholder(here: Path) -> None:
    write("p.jsonl", [{**record, "image": f"gone/{record['image']}"} for record in records()])
    said = init("--data", "p.jsonl")
    assert recipe().data.train[0].image_root == "FOLDER-OF-YOUR-IMAGES"
    assert "gone/0.png does not exist" in said
    Path("p.jsonl").unlink()
    said = init("--output", "other.yaml")
    assert recipe("other.yaml").data.train[0].path == "PATH-OF-YOUR-PAIRS.jsonl"
    assert "fill in data.train" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "photos"], "photos holds no pairs and no questions: no .jsonl"),
        (["--data", "void"], "of 2 files the first: no pair in"),
        (["--data", "nowhere/pairs.jsonl"], "no such file"),
        (["--data", "photos/0.png"], "no .jsonl, .json, .parquet file and no folder"),
        (["--data", "q.json"], "read from one file of JSON Lines"),
        (["--model", "photos"], "--model: no model can be loaded from photos: it has no config.json"),
        (["--model", "nowhere"], "there is no such folder"),
    ],
)
def test_what_cannot_be_used_is_one_line(here: Path, arguments: list[str], words: str) -> None:
    write("void/a.jsonl", [])
    write("void/b.jsonl", ["{"])
    Path("q.json").write_text(json.dumps([{"question": "how many?", "answer": "3"}]))
    said = init(*arguments, code=2)
    assert words in said.replace("\n", " ")
    assert said.startswith("error: ")
    assert not Path("recipe.yaml").exists()


def test_hostile_names_stay_names(here: Path) -> None:
    folder = here / "a: \x1b[31m #{}'\"\n- x: <b>"
    folder.mkdir()
    records_without_images = [{**record, "image": None, "question": "\x1b[31mwhat?"} for record in records()]
    write(str(folder / "no"), [])
    write(str(folder / "p: #.jsonl"), records_without_images)
    said = init("--data", str(folder))
    assert recipe().data.train[0].path == str(folder / "p: #.jsonl")
    assert "\x1b" not in said + Path("recipe.yaml").read_text()


# ---- memory ----


@pytest.mark.parametrize("tried", range(6))
def test_the_first_way_that_fits_is_taken(
    here: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tried: int
) -> None:
    """From all weights down to an adapter; the last one is taken even if it does not fit, and that is said."""
    asked: list[Recipe] = []

    def estimate(given: Recipe, *_: Any, **__: Any) -> MemoryEstimate:
        asked.append(given)
        peak = 1 if len(asked) > tried else 9
        return MemoryEstimate(1, "weights", 10, False, 5, peak, (1, 1), MemoryChoice([], RowBound()))

    monkeypatch.setattr(init_fit, "estimate_memory", estimate)
    write("p.jsonl", [{**record, "image": f"photos/{record['image']}"} for record in records()])
    said = init("--data", "p.jsonl", "--model", str(checkpoint))
    found = recipe()
    way = (found.model.lora is not None, found.reference.kind, found.training["activation_checkpointing"])
    assert (
        way
        == [
            (False, "auto", False),
            (False, "auto", True),
            (False, "cache", True),
            (True, "auto", False),
            (True, "auto", True),
            (True, "auto", True),
        ][tried]
    )
    assert ("vlmpo cache recipe.yaml" in said) == (tried == 2)
    assert ("even that does not fit" in said) == (tried == 5)
    assert asked[-1].model.lora is None or found.training["learning_rate"] == 1e-5
