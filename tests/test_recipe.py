"""The recipe: what it accepts, what it refuses and in which words, where its paths point."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPO
from vlmpo.commands.adapter_settings import lora_config
from vlmpo.commands.config import check_training_keys
from vlmpo.errors import RecipeError
from vlmpo.recipe import EXTRA_TRAINING_KEYS, training_fields
from vlmpo.recipe_yaml import dump_recipe, load_recipe, parse_recipe

MINIMAL = "model: {path: some/model}\ndata: {train: [pairs.jsonl]}\n"


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, where="r.yaml")
    return str(caught.value)


def test_defaults_are_the_papers():
    recipe = parse_recipe(MINIMAL)
    assert recipe.loss.weights == {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0}
    assert (recipe.loss.beta, recipe.loss.reward_shift, recipe.loss.nll_reduction) == (0.1, "previous", "sequence")
    assert (recipe.model.dtype, recipe.model.attention, recipe.reference.kind) == ("float32", "auto", "auto")
    assert (recipe.data.max_length, recipe.data.max_tiles, recipe.data.hold_out) == (8192, None, 0.0)
    assert (recipe.data.on_bad_record, recipe.data.over_long) == ("skip", "drop")
    source = recipe.data.train[0]
    assert (source.path, source.image_root, source.repeat, source.max_tiles) == ("pairs.jsonl", None, 1.0, None)


def test_a_recipe_is_frozen():
    recipe = parse_recipe(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.loss.beta = 0.5  # type: ignore[misc]


def test_round_trip_keeps_every_value():
    text = """
model: {path: m, dtype: bfloat16, freeze: [vision_tower], lora: {r: 16, target_modules: [q_proj]}, attention: separate}
reference: {kind: adapter}
data:
  train: [a.jsonl, {path: b.jsonl, image_root: images, repeat: 0.5, max_tiles: 6, name: b}]
  eval: [e.jsonl]
  hold_out: 0.1
  max_length: null
  on_bad_record: fail
  over_long: cut
loss: {weights: {nll: 1}, beta: 0.25, reward_shift: none, nll_reduction: token, label_smoothing: 0.1}
training: {learning_rate: 2e-7, run_name: 2026-01-31, project: '1e-6', max_grad_norm: .inf, save_strategy: no}
"""
    recipe = parse_recipe(text)
    again = parse_recipe(dump_recipe(recipe))
    assert again == recipe
    assert again.training == {
        "learning_rate": 2e-7,
        "run_name": "2026-01-31",
        "project": "1e-6",
        "max_grad_norm": float("inf"),
        "save_strategy": "no",
    }
    assert again.data.train[1].max_tiles == 6


@pytest.mark.parametrize("written", ["1e-6", "1.0e-6", "1E-6", "0.000001", "1.e-6", "+1e-6"])
def test_scientific_numbers_are_numbers(tmp_path, written):
    path = write(tmp_path, MINIMAL + f"training: {{learning_rate: {written}}}\nloss: {{beta: {written}}}\n")
    recipe = load_recipe(path, [f"training.weight_decay={written}"])
    assert recipe.training["learning_rate"] == 1e-6
    assert recipe.training["weight_decay"] == 1e-6
    assert recipe.loss.beta == 1e-6


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("loss: {bta: 0.2}", "r.yaml: loss.bta: unknown key; did you mean loss.beta?"),
        ("los: {beta: 0.2}", "r.yaml: los: unknown key; did you mean loss?"),
        ("beta: 0.2", "r.yaml: beta: unknown key; did you mean loss.beta?"),
        ("reference: {knd: copy}", "r.yaml: reference.knd: unknown key; did you mean reference.kind?"),
        ("loss: {zzz: 1}", "r.yaml: loss.zzz: unknown key; known here: weights, beta, reward_shift, nll_reduction, "),
        ("loss: {beta: high}", "r.yaml: loss.beta: expected a valid number, got 'high'"),
        ("loss: {beta: '0.2'}", "r.yaml: loss.beta: expected a valid number, got '0.2'"),
        ("loss: {beta: true}", "r.yaml: loss.beta: expected a valid number, got True"),
        ("loss: {beta: 0}", "r.yaml: loss.beta: expected greater than 0, got 0"),
        ("loss: {beta: .inf}", "r.yaml: loss.beta: expected a finite number, got inf"),
        ("loss: {label_smoothing: 0.5}", "r.yaml: loss.label_smoothing: expected less than 0.5, got 0.5"),
        (
            "loss: {label_smoothing: -0.1}",
            "loss.label_smoothing: expected greater than or equal to 0, got -0.1",
        ),
        ("loss: {reward_shift: prev}", "loss.reward_shift: expected 'previous', 'running' or 'none', got 'prev'"),
        ("loss: 3", "r.yaml: loss: expected a mapping of keys, got 3"),
        ("loss: {weights: 1}", "r.yaml: loss.weights: expected a mapping of keys, got 1"),
        ("loss: {weights: {sigmod: 1}}", "r.yaml: loss.weights: unknown term 'sigmod'; did you mean sigmoid?"),
        ("loss: {weights: {nll: -1, sigmoid: 1}}", "loss.weights: the weight of nll is -1.0; weights must not be neg"),
        ("loss: {weights: {nll: 0, sigmoid: 0}}", "r.yaml: loss.weights: no term has a weight above 0"),
        ("loss: {weights: {}}", "r.yaml: loss.weights: no term has a weight above 0"),
        ("loss: {weights: {nll: .nan}}", "r.yaml: loss.weights.nll: expected a finite number, got nan"),
        ("reference: {kind: adapter}", "r.yaml: reference.kind: 'adapter' disables the LoRA adapter, and there is"),
        (
            "training: {max_tokens_per_row: 0}",
            "training: max_tokens_per_row: expected a whole number of tokens above 0",
        ),
    ],
)
def test_refusals(extra, message):
    assert message in refusal(MINIMAL + extra)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{train: []}", "data.train: names no data set"),
        ("{train: a.jsonl}", "data.train: expected a list, got 'a.jsonl'"),
        ("{eval: [a.jsonl]}", "data.train: names no data set"),
        ("{train: [3]}", "data.train.0: expected a mapping of keys, got 3"),
        (
            "{train: [{path: a, image_rot: b}]}",
            ".0.image_rot: unknown key; did you mean data.train.image_root?",
        ),
        ("{train: [{path: a, repeat: 0}]}", "data.train.0.repeat: expected greater than 0, got 0"),
        ("{train: [a], hold_out: 1.0}", "data.hold_out: expected less than 1, got 1.0"),
        ("{train: [a], hold_out: -0.1}", "data.hold_out: expected greater than or equal to 0, got -0.1"),
        ("{train: [a], over_long: truncate}", "data.over_long: expected 'drop' or 'cut', got 'truncate'"),
        ("{train: [a], on_bad_record: raise}", "data.on_bad_record: expected 'skip' or 'fail', got 'raise'"),
        ("{train: [a], max_length: 8192.5}", "data.max_length: expected a valid integer, got 8192.5"),
        ("{train: [a], max_tiles: 0}", "data.max_tiles: expected greater than or equal to 1, got 0"),
    ],
)
def test_refusals_of_data(data, message):
    assert message in refusal(f"model: {{path: m}}\ndata: {data}\n")


def test_every_problem_is_named_at_once():
    lines = refusal(MINIMAL + "loss: {bta: 1, label_smoothing: 2}").splitlines()
    assert len(lines) == 2
    assert "loss.label_smoothing" in lines[0]
    assert "loss.bta" in lines[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "r.yaml:2: not valid YAML"),
        ("- 1\n", "expected a mapping with the keys model, reference, data, loss, build, evaluate, training, got [1]"),
        ("", "got None"),
        ("loss: {beta: 0.1}\nmodel: {path: m}\nloss: {beta: 0.2}\n", "r.yaml:3: not valid YAML: loss is given twice"),
    ],
)
def test_text_that_is_no_recipe(text, message):
    assert message in refusal(text + "\n")


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: {path: \xe9}")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


# --- overrides ---


def test_overrides_win_in_order(tmp_path):
    path = write(tmp_path, MINIMAL + "loss: {beta: 0.3}\n")
    overrides = ["loss.beta=0.2", "loss.beta=0.4", "training.learning_rate=1e-6", "training.run_name=a=b"]
    overrides += [
        "data.train=[a.jsonl, {path: b}]",
        "data.max_length=null",
        "training.output_dir=out",
        "model.lora.r=8",
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.loss.beta == 0.4
    assert recipe.training == {"learning_rate": 1e-6, "output_dir": "out", "run_name": "a=b"}
    assert [source.path for source in recipe.data.train] == ["a.jsonl", "b"]
    assert recipe.data.max_length is None
    assert recipe.model.lora == {"r": 8}


def test_one_weight_overridden_leaves_the_other_terms_on(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL), ["loss.weights.nll=0.5"])
    assert recipe.loss.weights == {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 0.5}
    sft = load_recipe(write(tmp_path, MINIMAL), ["loss.weights={nll: 1}"])
    assert sft.loss.weights == {"nll": 1.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.bta=1", "command line: loss.bta: unknown key; did you mean loss.beta?"),
        ("loss.beta", "override 'loss.beta': expected key=value"),
        ("=1", "override '=1': expected key=value"),
        ("loss..beta=1", "expected key=value"),
        ("loss.beta=", "command line: loss.beta: expected a valid number, got None"),
        ("loss.beta=[", "override 'loss.beta=[':1: not valid YAML"),
        ("model.path.x=1", "override 'model.path.x=1': model.path is 'some/model' and has no keys"),
        ("training=3", "command line: training: expected a mapping of keys, got 3"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert message in str(caught.value)


# --- paths ---


def test_paths_beside_the_recipe_are_found_from_anywhere(tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    for name in ("m", "images"):
        (home / name).mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (home / name).touch()
    (elsewhere / "a.jsonl").touch()
    (elsewhere / "c.jsonl").touch()
    text = "model: {path: m}\ndata: {train: [a.jsonl, {path: b.jsonl, image_root: images}], eval: [c.jsonl]}\n"
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(write(home, text))
    assert recipe.model.path == str(home / "m")
    assert [source.path for source in recipe.data.train] == [str(home / "a.jsonl"), str(home / "b.jsonl")]
    assert recipe.data.train[1].image_root == str(home / "images")
    assert recipe.data.eval[0].path == "c.jsonl"  # not beside the recipe: the working directory's
    typed = load_recipe(home / "r.yaml", ["data.train=[a.jsonl]"])
    assert typed.data.train[0].path == "a.jsonl"  # typed in the working directory, so meant there
    assert load_recipe(home / "r.yaml", ["model.path=org/model"]).model.path == "org/model"


def test_output_dir_is_named_after_the_recipe(tmp_path):
    assert load_recipe(write(tmp_path, MINIMAL, "my.run.yaml")).training["output_dir"] == "runs/my.run"
    given = write(tmp_path, MINIMAL + "training: {output_dir: here}\n")
    assert load_recipe(given).training["output_dir"] == "here"


def test_an_empty_section_is_a_default_one(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL + "loss:\ntraining:\n  # learning_rate: 1e-6\n"))
    assert recipe.loss.beta == 0.1
    assert recipe.training == {"output_dir": "runs/r"}


# --- keys of other libraries ---


def test_training_keys_are_held_against_the_known_ones():
    check_training_keys(parse_recipe(MINIMAL + "training: {learning_rate: 1e-6, max_tokens_per_row: 4096}"))
    with pytest.raises(RecipeError, match=r"training\.lerning_rate: unknown.*did you mean training\.learning_rate\?"):
        check_training_keys(parse_recipe(MINIMAL + "training: {lerning_rate: 1e-6}"))
    with pytest.raises(RecipeError, match=r"training\.group_by_prompt: .*did you mean data\.group_by_prompt\?"):
        check_training_keys(parse_recipe(MINIMAL + "training: {group_by_prompt: 3}"))
    with pytest.raises(RecipeError, match=r"did you mean training\.max_tokens_per_row\?"):
        check_training_keys(parse_recipe(MINIMAL + "training: {max_token_per_row: 4096}"))


def test_lora_keys_are_held_against_the_known_ones():
    text = "model: {path: m, lora: {r: 8, lora_alfa: 16}}\ndata: {train: [a]}\n"
    with pytest.raises(RecipeError, match=r"model\.lora\.lora_alfa: .*did you mean model\.lora\.lora_alpha\?"):
        lora_config(parse_recipe(text))
    assert lora_config(parse_recipe(MINIMAL)) is None


# --- what ships ---


def readme_recipes() -> list[str]:
    blocks = re.findall(r"```yaml\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks, "the README shows no recipe"
    return blocks


@pytest.mark.parametrize("block", readme_recipes())
def test_every_recipe_in_the_readme_parses(block):
    recipe = parse_recipe(block, where="README.md")
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_the_published_recipe_holds_the_published_settings():
    recipe = load_recipe(REPO / "recipes" / "internvl3.yaml")
    training = recipe.training
    assert (training["learning_rate"], training["weight_decay"], training["warmup_steps"]) == (2e-7, 0.05, 0.03)
    assert (training["lr_scheduler_type"], training["num_train_epochs"]) == ("cosine", 1)
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * 8 == 256
    assert (recipe.model.dtype, training["bf16"], recipe.model.freeze) == ("float32", True, ())
    assert (recipe.data.max_length, recipe.data.max_tiles, recipe.loss.beta) == (12288, 12, 0.1)


@pytest.mark.slow
def test_reading_a_recipe_imports_no_torch():
    code = (
        "import sys; from vlmpo.recipe_yaml import load_recipe; load_recipe('recipes/lora_24gb.yaml');"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_setting_of_the_recipe_is_a_field_of_mpo_config():
    """And every field that MPOConfig adds to TrainingArguments is a key of the recipe."""
    import dataclasses

    from vlmpo.train.config import MPOConfig

    added = {field.name for field in dataclasses.fields(MPOConfig)} - training_fields()
    settings = parse_recipe(MINIMAL + "training: {learning_rate: 1e-6}\n").trainer_settings()
    assert settings.pop("learning_rate") == 1e-6
    by_option = {"allow_changes"}  # --allow-changes: of one start of a run, not of the run
    assert set(settings) | set(EXTRA_TRAINING_KEYS) | by_option == added


def test_the_verifiers_a_recipe_may_name_are_those_there_are():
    from typing import get_args

    from vlmpo.settings import Verifier
    from vlmpo.verifiers.verifiers import VERIFIERS

    assert set(get_args(Verifier)) == set(VERIFIERS)


# ---- hostile recipes ----

_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
_MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("training: {a: !!python/object/apply:os.system [x]}", "values with a tag"),
        ("training: {a: !!binary aGk=}", "!!binary: values with a tag"),
        ("training: {a: !!bool maybe}", "values with a tag"),
        ("training: {a: !mine x}", "!mine: values with a tag"),
        ("training: {a: !!set {x, y}}", "values with a tag"),
        (_LAUGHS, "more than 20000 values"),
        (_MERGES, "more than 20000 values"),
        ("training: &t {again: *t}", "more than 20000 values"),
        ("training: {a: " + "[" * 100_000, "nested more than 32 levels"),
        ("training: {a: " + "[" * 40 + "]" * 40 + "}", "nested more than 32 levels"),
        ('training: {output_dir: "a\\0b"}', "training.output_dir: 'a\\x00b' holds a NUL character"),
        ('training: {run_name: "\\ud800"}', "half of a character"),
        ("training: {learning_rate: .nan}", "training.learning_rate: expected a finite number, got nan"),
        ("training: {output_dir: " + "a" * 300 + "}", "File name too long"),
        ("evaluate: {questions: " + "a/" * 3000 + "}", "File name too long"),
    ],
)
def test_hostile_recipes_get_one_line(tmp_path, line, message):
    file = tmp_path / "r.yaml"
    file.write_text("model: {path: some/model}\ndata: {train: [pairs.jsonl]}\n" + line)
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 500


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, message in (
        (tmp_path / "fifo", "a FIFO, a device"),
        ("/dev/zero", "a FIFO, a device"),
        (tmp_path, "director"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
    (tmp_path / "long.yaml").write_text("#" * 300_000)
    for path, message in ((tmp_path / "long.yaml", "256 KiB"), ("x" * 300, "too long"), ("a\0b", "NUL")):
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
    (tmp_path / "r.yaml").write_text("model: {path: some/model}\ndata: {train: [pairs.jsonl]}\n")
    for override in (f"data.train=[{tmp_path}/fifo]", "model.path=/dev/null", f"data.eval=[{{path: {tmp_path}/fifo}}]"):
        with pytest.raises(RecipeError, match="expected a file or a folder, this is a FIFO"):
            load_recipe(tmp_path / "r.yaml", [override])


def test_anchors_and_merges_of_a_usual_size_are_fine(tmp_path):
    text = "data:\n  train: [&a {path: a.jsonl, repeat: 2}, {<<: *a, path: b.jsonl}]\nmodel: {path: m}\n"
    (tmp_path / "r.yaml").write_text(text)
    assert [(source.path, source.repeat) for source in load_recipe(tmp_path / "r.yaml").data.train] == [
        ("a.jsonl", 2.0),
        ("b.jsonl", 2.0),
    ]


@pytest.mark.parametrize("override", ["a" * 300_000, "loss.beta=" + "1" * 300_000, "x" * 10**7 + "=1"])
def test_an_override_that_is_too_long_is_not_read(tmp_path: Path, override: str) -> None:
    (tmp_path / "r.yaml").write_text("model: {path: m}\n")
    with pytest.raises(RecipeError, match="it has more than 256 KiB") as caught:
        load_recipe(tmp_path / "r.yaml", [override])
    assert len(str(caught.value)) < 200
