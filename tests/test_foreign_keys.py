"""Keys of other tools, options that are settings, and arguments of a wrong kind: each gets one line that says what."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import TrainingArguments
from typer.testing import CliRunner

from tests import foreign_table
from vlmpo import MPOConfig
from vlmpo.cli import app
from vlmpo.commands.config import check_training_keys
from vlmpo.errors import RecipeError
from vlmpo.foreign_table import ROWS, TABLE
from vlmpo.options import answer_options
from vlmpo.recipe import EXTRA_TRAINING_KEYS, SECTIONS, training_fields
from vlmpo.recipe_yaml import load_recipe, parse_recipe

MINIMAL = "model: {path: some/model}\ndata: {train: [pairs.jsonl]}\n"
LORA = {field.name for field in dataclasses.fields(peft.LoraConfig)}


# ---- the table ----


def test_every_key_of_ours_in_the_table_exists() -> None:
    own = {f"{section}.{key}" for section, model in SECTIONS.items() if section for key in model.model_fields}
    own |= {f"training.{key}" for key in training_fields() | set(EXTRA_TRAINING_KEYS)}
    own |= {f"model.lora.{key}" for key in LORA} | {
        f"training.learning_rates.{part}" for part in ("vision", "projector")
    }
    assert [row for row in ROWS if row.ours and row.ours not in own] == []
    assert [row for row in ROWS if not row.ours and not row.say] == []
    assert len(TABLE) == len(ROWS), "a key is there twice"
    # A key of ours that means what it says needs no answer.
    assert set(TABLE) & set().union(*(model.model_fields for model in SECTIONS.values())) <= {"strict"}


def test_fields_read_from_the_source_are_those_of_the_class() -> None:
    assert training_fields() == {field.name for field in dataclasses.fields(TrainingArguments)}


def test_the_page_is_the_table() -> None:
    assert foreign_table.FILE.read_text(encoding="utf-8") == foreign_table.text(), "python -m tests.foreign_table"


def test_trl_keys_are_all_answered() -> None:
    trl = pytest.importorskip("trl")
    classes = (trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments)
    theirs = {field.name for one in classes for field in dataclasses.fields(one)} - training_fields()
    known = set(TABLE) | {key for model in SECTIONS.values() for key in model.model_fields}
    assert sorted(theirs - known) == []


# ---- in a recipe ----


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        check_training_keys(parse_recipe(text, where="r.yaml"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ("pref_beta: 0.2", "r.yaml: pref_beta: a key of LLaMA-Factory; write loss.beta: 0.2"),
        ("loss: {pref_beta: 0.2}", "r.yaml: pref_beta: a key of LLaMA-Factory; write loss.beta: 0.2"),
        ("cutoff-len: 2048", "cutoff-len: a key of LLaMA-Factory; write data.max_length: 2048"),
        ("precompute_ref_log_probs: true", "a key of TRL; write reference.kind: cache"),
        ("warmup_ratio: 0.1", "a key of transformers 4; write training.warmup_steps: 0.1"),
        ("max_pixels: 1003520", "a key of ms-swift, Qwen-VL; write data.max_tiles: 5"),
        ("val_size: 500", "write data.hold_out; a share of the pairs"),  # a number of pairs has no share
        ("lora_target: 'q_proj,v_proj'", 'write model.lora.target_modules: ["q_proj", "v_proj"]'),
        ("finetuning_type: lora\nlora_rank: 8", 'finetuning_type: a key of LLaMA-Factory; write model.lora: {"r": 8}'),
        ("quantization_bit: 4", "write model.quantize: 4bit"),
        ("torch_dtype: float16", "write model.dtype; float32 or bfloat16"),
        ("freeze_vit: true\nfreeze_aligner: true", 'model.freeze: ["vision_tower", "multi_modal_projector"]'),
        ("hub_token: hf_secret", "hub_token: a key of transformers; log in with `hf auth login`"),
        ("seed: 3", "seed: unknown key; did you mean training.seed?"),
        ("learning_rte: 3", "did you mean training.learning_rate?"),
        ("training.seed: 3", "training.seed: dots are for the command line; in a file seed is a line under training"),
        (
            "training: {loss_type: sigmoid}",
            "training: loss_type: a key of InternVL, ms-swift, TRL; write loss.weights: ",
        ),
        ("training: {beta: 1, zeta: 1}", "training.beta: unknown key, not a field of transformers.TrainingArguments; "),
    ],
)
def test_a_key_of_another_tool(extra: str, line: str) -> None:
    message = refused(MINIMAL + extra)
    assert line in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        (
            "loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1.0]",
            {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0},
        ),
        ("loss_type: sigmoid\nrpo_alpha: 1.0", {"sigmoid": 1.0, "nll": 1.0}),
        (
            "loss_type: sigmoid,bco_pair\nsigmoid_loss_weight: 0.8\nbco_pair_loss_weight: 0.2\nrpo_alpha: 1",
            {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0},
        ),
        ("pref_loss: sigmoid\npref_ftx: 0.5", {"sigmoid": 1.0, "nll": 0.5}),
        ("pref_loss: sigmoid\npref_bco_weight: 0.25\npref_ftx: 0.0", {"sigmoid": 1.0, "bco_pair": 0.25}),
        ("pref_loss: simpo", None),
    ],
)
def test_the_objective_is_read_as_a_whole(given: str, weights: dict[str, float] | None) -> None:
    """By hand: each tool's terms and weights."""
    (line,) = [line for line in refused(MINIMAL + given).splitlines() if "loss.weights" in line]
    written = line.partition("write loss.weights")[2].partition(";")[0].removeprefix(": ")
    assert (json.loads(written) if written else None) == weights


FACTORY = """
model_name_or_path: Qwen/Qwen2.5-VL-7B-Instruct
stage: dpo
do_train: true
finetuning_type: lora
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
dataset: rlhf_v
dataset_dir: data
template: qwen2_vl
output_dir: saves/dpo
learning_rate: 5.0e-6
bf16: true
deepspeed: ds.json
"""


def test_a_whole_configuration_is_answered_in_one_message() -> None:
    message = refused(FACTORY)
    keys = [line.partition(":")[0] for line in FACTORY.split("\n") if line]
    for key in keys:
        assert f"r.yaml: {key}: " in message, key
    lines = message.splitlines()
    assert len(lines) == len(keys) + 1  # and where the table is; `model` is not missed besides
    assert "write model.path: Qwen/Qwen2.5-VL-7B-Instruct" in lines[0]


def test_a_section_that_is_given_one_value() -> None:
    assert "model: expected a mapping of keys, got 'org/name'; write model.path: org/name" in refused("model: org/name")


# ---- as an option ----


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["--learning_rate", "1e-6"], ["--learning_rate 1e-6: write training.learning_rate=1e-6"]),
        (["--learning-rate=1e-6"], ["--learning-rate 1e-6: write training.learning_rate=1e-6"]),
        (["--loss.beta", "0.2"], ["--loss.beta 0.2: write loss.beta=0.2"]),
        (["--training.seed=3"], ["--training.seed 3: write training.seed=3"]),
        (["--bf16", "--beta", "0.2"], ["--bf16: write training.bf16=true", "--beta 0.2: write loss.beta=0.2"]),
        (["--no-bf16"], ["--bf16 false: write training.bf16=false"]),
        (["--max_steps", "-1"], ["--max_steps -1: write training.max_steps=-1"]),
        (["--model", "org/name"], ["--model org/name: write model.path=org/name"]),
        (["--pref_beta=0.3"], ["--pref_beta 0.3: an option of LLaMA-Factory; write loss.beta=0.3"]),
        (
            ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.5", "loss.beta=0.2"],
            ["--loss_type sigmoid sft --loss_weights 1 0.5: options of ms-swift, TRL; write 'loss.weights="],
        ),
        (["--lerning_rate", "1"], ["--lerning_rate: no option and no setting; did you mean training.learning_rate?"]),
        (["--seed", "3", "--zzz"], ["--seed 3: write training.seed=3", "--zzz: no option and no setting"]),
    ],
)
def test_an_option_that_is_a_setting(options: list[str], lines: list[str]) -> None:
    told = answer_options(["r.yaml", *options, "--pairs", "3"], {"--pairs"})
    assert told is not None
    for line, expected in zip(told.splitlines(), lines, strict=True):
        assert line.startswith(expected)


@pytest.mark.parametrize("options", [[], ["--pairs", "3"], ["--pair", "3"], ["--zzz"], ["--", "--seed=3"], ["-h"]])
def test_options_that_the_command_itself_answers(options: list[str]) -> None:
    assert answer_options(["r.yaml", "loss.beta=0.2", *options], {"--pairs"}) is None


# ---- as a keyword ----


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
            "write loss_weights={'sigmoid': 1.0, 'nll': 0.5}",
        ),
        ({"precompute_ref_log_probs": True}, "a keyword of TRL; write reference_kind='cache'"),
        ({"cutoff_len": 8, "lerning_rate": 1}, "write max_length=8; longer pairs are dropped"),
        ({"cutoff_len": 8, "lerning_rate": 1}, "lerning_rate: unknown keyword; did you mean learning_rate?"),
        ({"vit_lr": 1.0}, "write learning_rates={'vision': 1.0}"),
        ({"lora_r": 8}, "pass MPOTrainer(peft_config=peft.LoraConfig(...))"),
        ({"padding_free": True}, "leave it out: rows are packed without padding"),
    ],
)
def test_a_keyword_of_another_configuration(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError) as caught:
        MPOConfig(output_dir=str(tmp_path), **given)
    assert told in str(caught.value)
    assert str(caught.value).startswith("MPOConfig: ")


@pytest.mark.parametrize("value", [None, True, "x", 3, [1, "x"], {"a": 1}], ids=str)
def test_every_key_has_an_answer_whatever_its_value(value: Any, tmp_path: Path) -> None:
    fields = {field.name for field in dataclasses.fields(MPOConfig)}
    for key in TABLE:
        assert answer_options([f"--{key}", str(value)], ())
        assert key in refused(f"{MINIMAL}{key}: {json.dumps(value or 1)}")
        if key not in fields:
            with pytest.raises(TypeError, match=key):
                MPOConfig(output_dir=str(tmp_path), **{key: value})


# ---- arguments of a wrong kind ----


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    files = {
        "train.yaml": MINIMAL,
        "build.yaml": "model: {path: some/model}\nbuild: {questions: questions.jsonl}\n",
        "open.yaml": "model: {path: some/model}\nbuild: {questions: open.jsonl}\n",
        "accelerate.yaml": "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n",
        "ds.json": '{"zero_optimization": {"stage": 3}}',
        "pairs.jsonl": '{"question": "a?", "chosen": "b", "rejected": "c"}\n{"question": "a?"}\n',
        "questions.jsonl": '{"question": "a?", "answer": "b"}\n',
        "open.jsonl": '{"question": "a?"}\n',
        "responses.jsonl": '{"question_id": "1", "text": "b"}\n',
        "meta.json": '{\n"a": {"root": "r",\n "annotation": "b.jsonl"}}',
        "image.png": "x",
        "run/manifest.json": "{}",
        "run/recipe.yaml": MINIMAL,
        "model/config.json": "{}",
        "empty/x": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("pair train.yaml", "build: missing; train.yaml is a recipe to train (vlmpo train train.yaml). vlmpo pair"),
        ("pair correctness train.yaml", "build: missing; train.yaml is a recipe to train (vlmpo train train.yaml)."),
        ("sample train.yaml", "build: missing; train.yaml is a recipe to train (vlmpo train train.yaml). vlmpo sample"),
        ("pair build.yaml", "vlmpo pair correctness build.yaml; if not, vlmpo pair dropout-ntp build.yaml"),
        ("pair open.yaml", "its questions have no answers, so: vlmpo pair dropout-ntp open.yaml"),
        ("train build.yaml", "data.train: names no data set to train on; build.yaml is a recipe to make pairs"),
        ("pair questions.jsonl", "questions.jsonl is a file of questions, no recipe; a recipe is a YAML file that"),
        ("train pairs.jsonl", "pairs.jsonl is a file of preference pairs, no recipe; "),
        ("inspect meta.json", "meta.json is a meta.json of MMPR, no recipe; "),
        ("evaluate responses.jsonl", "responses.jsonl is a file of sampled responses, no recipe; "),
        ("train image.png", "image.png is an image, no recipe"),
        ("train ds.json", "ds.json is DeepSpeed's configuration, no recipe; a recipe is a YAML file that names it, in"),
        ("train accelerate.yaml", "no recipe: accelerate launch --config_file accelerate.yaml -m vlmpo train RECIPE"),
        (
            "train run",
            "run is a run folder, no recipe: vlmpo train run/recipe.yaml training.resume_from_checkpoint=true",
        ),
        ("evaluate run", "run is a run folder, no recipe: vlmpo evaluate run/recipe.yaml; vlmpo report run shows it"),
        (
            "train model",
            "model is the folder of a model, no recipe; a recipe is a YAML file that names it, in model.path",
        ),
        ("train .", ". is a folder of data, no recipe; a recipe is a YAML file that names it, in data.train"),
        ("train empty", "empty is a folder, no recipe; vlmpo train takes a recipe, a YAML file"),
        (
            "train loss.beta=0.2",
            "loss.beta=0.2: the recipe comes first, then key=value: vlmpo train RECIPE loss.beta=0.2",
        ),
        ("train.yaml", "train.yaml is a recipe, and the command is missing: vlmpo train train.yaml"),
        ("report train.yaml", "train.yaml is a recipe; its run folder is runs/train (not there yet: vlmpo train"),
        ("merge train.yaml out", "train.yaml is a recipe; its run folder is runs/train (not there yet: vlmpo train"),
        ("report pairs.jsonl", "pairs.jsonl is a file of preference pairs; vlmpo report takes a run folder"),
        ("report model", "model is the folder of a model, no run folder; a report is of a run: vlmpo report runs/NAME"),
    ],
)
def test_an_argument_of_a_wrong_kind(place: Path, arguments: str, line: str) -> None:
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 2
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_recipe_in_json_is_one(place: Path) -> None:
    (place / "r.json").write_text('{"model": {"path": "m"}, "data": {"train": ["p.jsonl"]}, "loss": {"beta": true}}')
    result = CliRunner().invoke(app, ["train", "r.json"])
    assert "r.json: loss.beta: expected a valid number" in result.stderr
    assert load_recipe(place / "train.yaml").model.path == "some/model"


def test_a_number_beyond_all_floats_is_no_weight() -> None:
    assert "loss_weights" in refused(MINIMAL + f"loss_type: sigmoid\nloss_weights: 1{400 * '0'}")
