"""The recipes that ship: each is parsed, and each is run on a tiny model of its family, model and data replaced."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.commands.test_train import records, write_data
from tests.paths import REPO
from tests.zoo import FAMILIES
from vlmpo.cli import app
from vlmpo.commands.adapter_settings import lora_config
from vlmpo.commands.config import check_training_keys
from vlmpo.recipe_yaml import load_recipe

RECIPES = sorted((REPO / "recipes").glob("*.yaml"))
# What a recipe runs as here: the tiny model, and what a single process on a CPU cannot do.
FAMILY = {"qwen2_5_vl": "qwen2.5-vl", "qwen3_vl": "qwen3-vl", "qwen3_5": "qwen3.5", "smolvlm": "smolvlm"}
FAMILY |= {"internvl3_5": "internvl-qwen3"}
PARSED_ONLY = {
    "qlora": "4 bits need bitsandbytes and a GPU",
    "smoke": "runs as it ships, in tests/demo/test_demo.py, on what the demo has written",
}
LEFT_OUT = {  # keys that are parsed only, as they need several processes or a package that is not here
    "internvl3_38b": ["training.fsdp=null", "training.fsdp_config=null"],
    "full_fsdp2": ["training.fsdp=null", "training.fsdp_config=null"],
    "full_zero3": ["training.deepspeed=null"],
}
LIKE_ANOTHER = ("internvl3_5", "internvl3_38b", "full_zero3")  # once shortened: `make test-all` runs them
SHORT = ("use_cpu=true", "max_steps=2", "per_device_train_batch_size=2", "gradient_accumulation_steps=1")
SHORT += ("dataloader_num_workers=0", "disable_tqdm=true", "save_steps=1", "save_total_limit=1", "bf16=false")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_parses_and_every_key_has_a_reason(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.training["output_dir"] == f"runs/{path.stem}"
    assert isinstance(recipe.training["learning_rate"], float)
    check_training_keys(recipe)
    assert (lora_config(recipe) is None) == (recipe.model.lora is None)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    for above, line in itertools.pairwise(lines):
        bare = re.fullmatch(r" +[\w-]+: .+", line) and " # " not in line
        assert not bare or above.strip().startswith("#"), f"{path.name}: why {line.strip()}?"


@pytest.mark.parametrize("path", [*RECIPES, *(REPO / "recipes").glob("*/*.yaml")], ids=lambda path: path.stem)
def test_none_fixes_how_many_processes_run(path: Path) -> None:
    assert "num_processes" not in path.read_text(encoding="utf-8")


def test_the_table_names_every_recipe_and_the_commands_exist() -> None:
    text = (REPO / "recipes" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\[(\w+\.yaml)\]\(\1\)", text)) == {path.name for path in RECIPES}
    for name in set(re.findall(r"recipes/[\w/]+\.\w+", text)):
        assert (REPO / name).is_file(), name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs, questions and images."""
    folder = tmp_path_factory.mktemp("gallery")
    write_data(folder, records(6))
    asked = [{"image": f"{n % 4}.png", "question": f"how many? {n}", "answer": "3"} for n in range(4)]
    lines = [json.dumps({**one, "split": ("train", "test")[n % 2]}) for n, one in enumerate(asked)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def tiny(place: Path, stem: str) -> str:
    """The folder of the tiny model for a recipe, written once a family."""
    family = FAMILIES[FAMILY.get(stem, "internvl-qwen2")]
    folder = place / family.name
    if not folder.exists():
        family.model(0).save_pretrained(folder)
        family.processor().save_pretrained(folder)
    return str(folder)


def call(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output[-3000:]
    return result


def overrides(place: Path, stem: str) -> list[str]:
    source = f"{{path: {place / 'set' / 'pairs.jsonl'}, image_root: {place / 'set' / 'images'}}}"
    given = [
        f"model.path={tiny(place, stem)}",
        f"data.train=[{source}]",
        f"training.output_dir={place / 'runs' / stem}",
    ]
    given += [f"training.{setting}" for setting in SHORT]
    if load_recipe(REPO / "recipes" / f"{stem}.yaml").data.hold_out:
        given.append("data.hold_out=0.3")  # of four images
    return [*given, *LEFT_OUT.get(stem, [])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stem",
    [
        pytest.param(path.stem, marks=[pytest.mark.long] if path.stem in LIKE_ANOTHER else [])
        for path in RECIPES
        if path.stem not in (*PARSED_ONLY, "pipeline")
    ],
)
def test_it_runs_on_a_tiny_model_of_its_family(place: Path, stem: str) -> None:
    given = overrides(place, stem)
    given += {
        "cached_reference": [f"reference.cache_dir={place / 'cache'}"],
        "best_checkpoint": ["training.eval_steps=1"],
    }.get(stem, [])
    call("train", str(REPO / "recipes" / f"{stem}.yaml"), *given)
    manifest = json.loads((place / "runs" / stem / "manifest.json").read_text())
    assert (manifest["status"], manifest["steps"]) == ("finished", 2)
    if stem == "qwen3_5":
        assert manifest["model"]["shared_rows"] is False  # as its header says
    if stem == "best_checkpoint":
        assert manifest["final_model"]["step"] in (1, 2)
    if stem == "cached_reference":
        assert any((place / "cache").iterdir())


@pytest.mark.slow
def test_from_questions_to_an_evaluated_model(place: Path) -> None:
    """A tiny model is never right: what it has said is replaced before it is paired."""
    recipe, build = str(REPO / "recipes" / "pipeline.yaml"), place / "build"
    given = [*overrides(place, "pipeline"), f"build.output_dir={build}", "build.max_new_tokens=2", "build.samples=2"]
    for section in ("build", "evaluate"):
        given += [
            f"{section}.questions={place / 'questions.jsonl'}",
            f"{section}.image_root={place / 'set' / 'images'}",
        ]
    given += [f"evaluate.against={tiny(place, 'pipeline')}", "evaluate.max_new_tokens=2"]
    call("sample", recipe, *given)
    responses = [json.loads(line) for line in (build / "responses.jsonl").read_text().splitlines()]
    assert len(responses) == 4  # two to each question of the split
    for response in responses:
        response["finish_reason"] = "stop"
        response["text"] = f"It is so. Final answer: {3 + response['sample_index']}"
    (build / "responses.jsonl").write_text("".join(json.dumps(response) + "\n" for response in responses))
    call("pair", "correctness", recipe, *given)
    paired = build / "pairs_correctness.jsonl"
    call("train", recipe, *given, f"data.train=[{{path: {paired}}}]", "data.hold_out=0")
    call("evaluate", recipe, *given, f"data.train=[{{path: {paired}}}]", "data.hold_out=0")
    results = json.loads((place / "runs" / "pipeline" / "evaluation" / "evaluation.json").read_text())
    assert len(results["questions"]) > 0
