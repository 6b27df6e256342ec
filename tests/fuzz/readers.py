"""The readers under test: how an input is made, and how it is read. Reading raises nothing but a VlmpoError."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from peft import LoraConfig

from tests.fuzz import examples
from tests.fuzz.mutate import dumps, file_content, mutated, mutated_bytes, mutated_text, noise, odd_text, odd_value
from vlmpo.commands.adapter_settings import lora_config  # and, first of all, the stand-in for torchvision
from vlmpo.commands.config import training_config
from vlmpo.data.dataset import open_pairs
from vlmpo.data.formats import RecordContext
from vlmpo.data.formats.detect import FORMATS
from vlmpo.data.index.filter import screen
from vlmpo.data.readers.questions import read_questions
from vlmpo.data.readers.spec import SourceSpec, file_specs
from vlmpo.errors import RecordError
from vlmpo.generate.responses import open_responses, read_responses
from vlmpo.loss import RewardShift
from vlmpo.recipe_yaml import load_recipe
from vlmpo.train.checkpoint import STATE_FILE, check_rates, restore_state
from vlmpo.train.config import MPOConfig
from vlmpo.verifiers.answer import parse_final_answer
from vlmpo.verifiers.verifiers import VERIFIERS, verify

_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a4944415478da63f80f00010101"
    "00ff5e2f1b0000000049454e44ae426082"
)
_TRAINING = [field.name for field in dataclasses.fields(MPOConfig)]
_LORA = [field.name for field in dataclasses.fields(LoraConfig)]


class Reader(NamedTuple):
    """A reader under test.

    Attributes:
        make: an input, drawn; its ``repr`` says all about it.
        read: read it, in a folder of the worker's own.
    """

    make: Callable[[random.Random], Any]
    read: Callable[[Any, Path], None]


def prepare(folder: Path) -> None:
    """Lay out what valid input names: an image, a file of pairs."""
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / examples.IMAGE).write_bytes(_PIXEL)
    (folder / "pairs.jsonl").write_text(_lines(examples.RECORDS["mmpr"][:2]))
    (folder / "base.yaml").write_text(examples.RECIPE)
    (folder / "plain.yaml").write_text("model: {path: some/model}\ndata: {train: [pairs.jsonl]}\n")


def _lines(records: list[Any]) -> str:
    return "".join(f"{dumps(record)}\n" for record in records)


def _plain_lines(records: list[Any]) -> str:
    return "".join(f"{dumps(record, ascii_only=False)}\n" for record in records)


# ---- pairs ----


def _make_records(rng: random.Random) -> tuple[str, bytes]:
    records: list[Any] = examples.RECORDS[rng.choice(list(examples.RECORDS))] * 2
    if rng.random() < 0.25:
        return "data.json", file_content(records, rng, dumps)
    return "data.jsonl", file_content(records, rng, rng.choice((_lines, _plain_lines)))


def _read_records(case: tuple[str, bytes], folder: Path) -> None:
    name, content = case
    (folder / name).write_bytes(content)
    pairs = open_pairs([SourceSpec(path=str(folder / name), image_root=str(folder))])
    for index in range(len(pairs)):
        try:
            pairs[index]
        except RecordError as error:
            str(error)
    screen(pairs)


def _format(name: str) -> Reader:
    def make(rng: random.Random) -> Any:
        record: Any = rng.choice(examples.RECORDS[name])
        others = tuple(examples.RECORDS[rng.choice(list(examples.RECORDS))])
        for _ in range(rng.choice((1, 1, 2, 4))):
            record = mutated(record, rng, others)
        try:
            record = json.loads(dumps(record))
        except (ValueError, RecursionError):  # the records' reader sees to these
            record = {**examples.RECORDS[name][0], odd_text(rng): json.loads(dumps(odd_text(rng)))}
        if isinstance(record, dict) and record and rng.random() < 0.1:  # as columns of Parquet hold them
            embedded = rng.choice((b"", b"\xff\xd8", _PIXEL))
            record[rng.choice([*record, "images"])] = rng.choice(
                ({"bytes": embedded, "path": None}, [{"bytes": embedded, "path": "\ud83d"}], embedded, [embedded, None])
            )
        return record

    def read(record: Any, folder: Path) -> None:
        if isinstance(record, dict):  # a reader of records hands on nothing else
            FORMATS[name].parse(record, RecordContext("data.jsonl:1", "data", str(folder)))

    return Reader(make, read)


def _make_source(rng: random.Random) -> Any:
    if rng.random() < 0.7:
        return file_content([examples.META], rng, lambda records: dumps(records[0]))
    given = dict(examples.SOURCE)
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(given))
        given[key] = mutated_text(given[key] or "", rng)
    given["repeat"] = rng.choice((1, 0, 0.5, -1, float("nan"), float("inf"), 1e300, 10**400, True, "2", None))
    given["max_tiles"] = rng.choice((None, 1, 0, -1, 1.5, 10**30, "6", True))
    return given


def _read_source(case: Any, folder: Path) -> None:
    if isinstance(case, dict):
        file_specs(SourceSpec(**case), [])
        return
    (folder / "meta.json").write_bytes(case)
    open_pairs([SourceSpec(path=str(folder / "meta.json"))])


# ---- questions, responses, answers ----


def _make_questions(rng: random.Random) -> bytes:
    return file_content(examples.QUESTIONS, rng, rng.choice((_lines, _plain_lines)))


def _read_questions(content: bytes, folder: Path) -> None:
    file = folder / "questions.jsonl"
    file.write_bytes(content)
    for error in read_questions(file).dropped:
        str(error)
    read_questions(file, need_answer=False)


def _make_responses(rng: random.Random) -> bytes:
    return file_content(examples.RESPONSES, rng, rng.choice((_lines, _plain_lines)))


def _read_responses(content: bytes, folder: Path) -> None:
    file = folder / "responses.jsonl"
    file.write_bytes(content)
    first = examples.RESPONSES[0]
    read_responses(file)
    with open_responses(file, first["model"], first["settings"]):
        pass


def _make_answer(rng: random.Random) -> tuple[str, str, str]:
    response, truth, verifier = rng.choice(examples.ANSWERS)
    if rng.random() < 0.1:
        response = noise(rng).decode("latin-1")
    for _ in range(rng.choice((1, 1, 2, 5))):
        response = mutated_text(response, rng)
    if rng.random() < 0.3:
        truth = mutated_text(truth, rng)
    return response, truth, rng.choice((verifier, verifier, rng.choice(VERIFIERS)))


def _read_answer(case: tuple[str, str, str], folder: Path) -> None:
    response, truth, verifier = case
    parse_final_answer(response)
    verify(response, truth, verifier)


# ---- recipes ----


def _make_recipe(rng: random.Random) -> bytes:
    chance = rng.random()
    if chance < 0.05:
        return noise(rng)
    if chance < 0.5:
        recipe: Any = yaml.safe_load(examples.RECIPE)
        for _ in range(rng.choice((1, 1, 2, 4))):
            recipe = mutated(recipe, rng, (recipe if isinstance(recipe, dict) else {},))
        return dumps(recipe, rng.random() < 0.5).encode("utf-8", "surrogatepass")  # JSON is YAML
    text = examples.RECIPE
    if chance < 0.85:
        for _ in range(rng.choice((1, 1, 2))):
            text = mutated_text(text, rng)
        return text.encode("utf-8", "surrogatepass")
    return mutated_bytes(text.encode(), rng)


def _read_recipe(content: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    load_recipe(folder / "recipe.yaml")


def _make_overrides(rng: random.Random) -> list[str]:
    made = []
    for _ in range(rng.choice((1, 1, 2))):
        key, _, value = rng.choice(examples.OVERRIDES).partition("=")
        if rng.random() < 0.3:
            value = dumps(odd_value(rng), ascii_only=False)
        override = f"{key}={value}"
        made.append(mutated_text(override, rng) if rng.random() < 0.8 else override)
    return made


def _read_overrides(overrides: list[str], folder: Path) -> None:
    load_recipe(folder / "base.yaml", overrides)


def _make_library_keys(rng: random.Random) -> list[str]:
    """Keys that belong to other libraries, which a recipe hands on: TrainingArguments' and LoraConfig's."""
    made = []
    for _ in range(rng.choice((1, 1, 2))):
        section, keys = rng.choice((("training", _TRAINING), ("training", _TRAINING), ("model.lora", _LORA)))
        value = odd_value(rng) if rng.random() < 0.8 else rng.choice(("steps", 1, 0.5, True, "a.json", ["q_proj"]))
        made.append(f"{section}.{rng.choice(keys)}={dumps(value, ascii_only=False)}")
    return made


def _read_library_keys(overrides: list[str], folder: Path) -> None:
    recipe = load_recipe(folder / "plain.yaml", [*overrides, "training.use_cpu=true"])
    training_config(recipe)
    lora_config(recipe)


# ---- checkpoints ----


def _make_state(rng: random.Random) -> bytes:
    return file_content([examples.STATE], rng, lambda records: dumps(records[0]))


def _read_state(content: bytes, folder: Path) -> None:
    (folder / "checkpoint" / STATE_FILE).write_bytes(content)
    check_rates(folder / "checkpoint", examples.STATE["learning_rates"])
    restore_state(
        folder / "checkpoint",
        reward_shift=RewardShift("previous"),
        reference_hash=examples.STATE["reference_hash"],
    )


READERS: dict[str, Reader] = {
    "records": Reader(_make_records, _read_records),
    **{f"format-{name}": _format(name) for name in FORMATS},
    "questions": Reader(_make_questions, _read_questions),
    "responses": Reader(_make_responses, _read_responses),
    "meta": Reader(_make_source, _read_source),
    "recipe": Reader(_make_recipe, _read_recipe),
    "overrides": Reader(_make_overrides, _read_overrides),
    "library-keys": Reader(_make_library_keys, _read_library_keys),
    "verifier": Reader(_make_answer, _read_answer),
    "state": Reader(_make_state, _read_state),
}


def make_input(reader: str, seed: int, index: int) -> Any:
    """Input number ``index`` of a reader: the same every time."""
    return READERS[reader].make(random.Random(f"{seed}:{reader}:{index}"))
