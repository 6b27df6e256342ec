"""What a path is that a command was given in place of a recipe or a run folder, and which command wants it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from vlmpo.errors import RecipeError
from vlmpo.recipe import Recipe
from vlmpo.recipe_yaml import load_recipe

_MOST_BYTES = 256 << 10  # of a file that are looked at
_RECIPES = (".yaml", ".yml")
_DATA = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".txt")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SECTIONS = set(Recipe.model_fields)
_FOLDERS = (  # a file in a folder: what the folder is then
    ("manifest.json", "a run folder"),
    ("demo.json", "the folder of a demo"),
    ("evaluation.json", "the folder of an evaluation"),
    ("sample_manifest.json", "a folder of sampled responses"),
    ("adapter_config.json", "the folder of an adapter"),
    ("config.json", "the folder of a model"),
    ("dataset_info.json", "a data set"),
    ("meta.json", "a folder of data"),
)
_READ_BY = {  # what is no recipe: the recipe key that takes it
    "a folder of sampled responses": "build.output_dir",
    "the folder of an adapter": "model.path",
    "the folder of a model": "model.path",
    "a data set": "data.train",
    "a folder of data": "data.train",
    "a file of preference pairs": "data.train",
    "a meta.json of MMPR": "data.train",
    "a file of questions": "build.questions or evaluate.questions",
    "a file of sampled responses": "build.output_dir (its folder)",
    "DeepSpeed's configuration": "training.deepspeed",
    "an image": "data.train, in a file of pairs",
    "a file of weights": "model.path (its folder)",
}
_OF_QUESTIONS = ("sample", "pair correctness", "pair dropout-ntp")


def looks_like_path(word: str) -> bool:
    """Return whether an argument can only be meant as a path: it exists, or ends like a recipe or a data file."""
    return os.path.exists(word) or word.endswith((*_RECIPES, *_DATA)) or os.sep in word


def check_recipe_argument(command: str, path: Path) -> None:
    """Raise RecipeError if ``path``, given as a recipe to ``command``, is something else that can be recognised."""
    if path.is_dir():
        raise RecipeError(f"{path} is {_folder(path)}, no recipe{_remedy(command, path, _folder(path))}")
    if not path.exists() and "=" in str(path):
        raise RecipeError(f"{path}: the recipe comes first, then key=value: vlmpo {command} RECIPE {path}")
    kind = _file(path)
    if kind is not None and kind != "a recipe":
        raise RecipeError(f"{path} is {kind}, no recipe{_remedy(command, path, kind)}")


def check_sections(command: str, path: Path, recipe: Recipe) -> None:
    """Raise RecipeError if ``recipe`` lacks the section that ``command`` needs; say what it is a recipe for."""
    if command in _OF_QUESTIONS and recipe.build is None:
        raise RecipeError(
            f"build: missing; {path} is a recipe to train ({_wanted_by(path, recipe)}). vlmpo {command} needs a build "
            "section; give at least build.questions, the JSONL file of questions (docs/pairs.md)"
        )
    if command in ("train", "cache") and not recipe.data.train:
        raise RecipeError(
            f"data.train: names no data set to train on; {path} is a recipe to make pairs or to evaluate "
            f"({_wanted_by(path, recipe)}). Give data.train, e.g. the pairs that vlmpo pair has written"
        )


def check_run_argument(command: str, path: Path) -> None:
    """Raise RecipeError if ``path``, given to ``report`` or ``merge`` as a run folder, is something else."""
    kind = _file(path)
    arguments = " OUTPUT" if command == "merge" else ""
    if kind == "a recipe":
        run = Path("runs", path.stem)
        with suppress(RecipeError):
            run = Path(str(load_recipe(path).training["output_dir"]))
        there = "" if run.is_dir() else f" (not there yet: vlmpo train {path})"
        raise RecipeError(f"{path} is a recipe; its run folder is {run}{there}: vlmpo {command} {run}{arguments}")
    if path.is_file():
        what = kind or "a file"
        raise RecipeError(f"{path} is {what}; vlmpo {command} takes a run folder: vlmpo {command} runs/NAME{arguments}")
    if command == "report" and path.is_dir() and (kind := _folder(path)) in _READ_BY:
        raise RecipeError(f"{path} is {kind}, no run folder; a report is of a run: vlmpo report runs/NAME")


def no_command(program: str, path: Path) -> str:
    """Return what to say about ``vlmpo PATH`` or ``vlmpo pair PATH``: which command wants the path."""
    is_pair = program.endswith("pair")
    command = "pair correctness" if is_pair else "train"
    try:
        check_recipe_argument(command, path)
        recipe = load_recipe(path)
        if is_pair:
            check_sections(command, path, recipe)
    except RecipeError as error:
        return str(error)
    if not is_pair:
        return f"{path} is a recipe, and the command is missing: {_wanted_by(path, recipe)}"
    assert recipe.build is not None
    if _has_answers(Path(recipe.build.questions)) is False:
        fits = f"its questions have no answers, so: vlmpo pair dropout-ntp {path}"
    else:
        fits = f"if its questions have answers, vlmpo pair correctness {path}; if not, vlmpo pair dropout-ntp {path}"
    return f"{path}: by what are responses paired? Right with wrong ones, or with their half (dropout-ntp): {fits}"


def _wanted_by(path: Path, recipe: Recipe) -> str:
    """Return the commands that a recipe is for."""
    commands = [f"vlmpo train {path}"] if recipe.data.train else []
    if recipe.build is not None:
        commands += [f"vlmpo sample {path}", f"vlmpo pair correctness {path}"]
    if recipe.evaluate is not None:
        commands.append(f"vlmpo evaluate {path}")
    return ", ".join(commands)


def _remedy(command: str, path: Path, kind: str) -> str:
    """Return what to do with a path of this kind, which was given to ``command`` as a recipe."""
    if (path / "recipe.yaml").is_file():
        go_on = " training.resume_from_checkpoint=true" if command == "train" else ""
        report = f"; vlmpo report {path} shows it" if kind == "a run folder" else ""
        return f": vlmpo {command} {path / 'recipe.yaml'}{go_on}{report}"
    if kind in ("a run folder", "the folder of a demo", "the folder of an evaluation"):
        return f"; vlmpo report {path} shows it"
    if kind == "a folder" and (inside := sorted(one.name for one in path.glob("*.y*ml"))[:3]):
        return f"; in it: {', '.join(inside)}. vlmpo {command} {path / inside[0]}"
    if kind == "accelerate's configuration":
        return f": accelerate launch --config_file {path} -m vlmpo {command} RECIPE"
    if key := _READ_BY.get(kind):
        return f"; a recipe is a YAML file that names it, in {key}"
    return f"; vlmpo {command} takes a recipe, a YAML file"


# ---- recognising ----


def _folder(path: Path) -> str:
    return next((kind for name, kind in _FOLDERS if (path / name).exists()), "a folder")


def _file(path: Path) -> str | None:
    """Return what a file is, by its name and beginning; None if that does not tell."""
    if not path.is_file():  # a FIFO or a device: reading would not end
        return None
    suffix = path.suffix.lower()
    for kind, suffixes in (("an image", _IMAGES), ("a file of weights", _WEIGHTS)):
        if suffix in suffixes:
            return kind
    if suffix in (".parquet", ".arrow", ".csv", ".tsv"):
        return "a file of preference pairs"
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_BYTES)
    except (OSError, ValueError):
        return None
    return _of_record(_first_record(text, suffix))


def _first_record(text: str, suffix: str) -> Any:
    """Return the first object of JSON lines or of a JSON array, or the whole YAML mapping; None if there is none."""
    start = text.lstrip().removeprefix("[").lstrip()
    with suppress(ValueError, RecursionError, yaml.YAMLError):
        if start.startswith("{"):
            return json.JSONDecoder().raw_decode(start)[0]
        return _top_keys(text) if suffix in _RECIPES else None
    return None


def _top_keys(text: str) -> dict[str, None]:
    """Return the keys of a YAML mapping, without values: they are neither built nor are aliases followed."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return {key.value: None for key, _ in pairs if isinstance(key, yaml.ScalarNode)}


def _of_record(record: Any) -> str | None:
    if not isinstance(record, Mapping):
        return None
    keys = set(record)
    if keys & {"model", "data", "build"} and keys <= _SECTIONS:
        return "a recipe"
    if keys & {"compute_environment", "distributed_type"}:
        return "accelerate's configuration"
    if keys & {"zero_optimization", "train_micro_batch_size_per_gpu"}:
        return "DeepSpeed's configuration"
    if keys & {"chosen", "rejected"} or {"conversations", "rejected_response"} & keys:
        return "a file of preference pairs"
    if "question_id" in keys and "text" in keys:
        return "a file of sampled responses"
    if "question" in keys:
        return "a file of questions"
    if any(isinstance(value, Mapping) and "annotation" in value for value in record.values()):
        return "a meta.json of MMPR"
    return None


def _has_answers(questions: Path) -> bool | None:
    """Return whether the first question has an answer; None if that cannot be told."""
    if not questions.is_file():
        return None
    with suppress(OSError, ValueError), questions.open(encoding="utf-8") as file:
        record = _first_record(file.read(_MOST_BYTES), ".jsonl")
        return bool(record.get("answer")) if isinstance(record, Mapping) else None
    return None
