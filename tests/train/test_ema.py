"""The moving average of the weights: by hand, across a resume, in the run folder; and it touches nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from tests.commands.test_train import call, checkpoint, records, write_data, write_recipe  # noqa: F401  a fixture
from tests.tiny_models import model as tiny_model
from tests.train.test_ranks import two_processes
from tests.training import flat_weights, logged, pairs, relative, trainer
from vlmpo import MPOTrainer
from vlmpo.errors import RecipeError, RunError
from vlmpo.train.config import MPOConfig
from vlmpo.train.ema import AVERAGE_FILE, WeightAverage


class Weights(TrainerCallback):
    """Keeps the weights before training and after every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(flat_weights(model).clone())

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(flat_weights(model).clone())


def flat_average(run: MPOTrainer) -> torch.Tensor:
    return torch.cat([run.average.averages[name].flatten() for name, _ in run.model.named_parameters()])


def one_weight(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(value)
    return layer.to(dtype)


def test_by_hand() -> None:
    """4, then steps to 2, 0 and 8 at decay 0.5: 4 -> (4+2)/2 = 3 -> (3+0)/2 = 1.5 -> (1.5+8)/2 = 4.75."""
    layer, average = one_weight(4.0), WeightAverage(0.5)
    average.on_train_begin(None, None, None, model=layer)
    found = [average.averages["weight"].item()]
    for value in (2.0, 0.0, 8.0):
        layer.weight.data.fill_(value)
        average.on_optimizer_step(None, None, None, model=layer)
        found.append(average.averages["weight"].item())
    assert found == [4.0, 3.0, 1.5, 4.75]


def test_it_is_kept_in_float32_for_bfloat16_weights() -> None:
    """1 and then 1.0078125, the next bfloat16: at decay 0.75 the average is 1.001953125, which bfloat16 has not."""
    layer, average = one_weight(1.0, torch.bfloat16), WeightAverage(0.75)
    average.on_train_begin(None, None, None, model=layer)
    layer.weight.data.fill_(1.0078125)
    average.on_optimizer_step(None, None, None, model=layer)
    assert average.averages["weight"].dtype == torch.float32
    assert average.averages["weight"].item() == 1.001953125
    with average.applied_to(layer):
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight.item() == 1.0  # rounded to the model's dtype
    assert layer.weight.item() == 1.0078125


def test_a_skipped_step_is_none_and_frozen_weights_have_no_average() -> None:
    layer, average = nn.Linear(1, 1), WeightAverage(0.5)
    layer.bias.requires_grad_(False)
    average.on_train_begin(None, None, None, model=layer)
    before = average.averages["weight"].item()
    with torch.no_grad():
        layer.weight += 2.0
    average.on_optimizer_step(None, None, None, model=layer, optimizer=SimpleNamespace(step_was_skipped=True))
    assert average.averages["weight"].item() == before
    average.on_optimizer_step(None, None, None, model=layer, optimizer=SimpleNamespace(step_was_skipped=False))
    assert average.averages["weight"].item() == pytest.approx(before + 1.0)
    assert list(average.averages) == ["weight"]


def test_the_model_gets_its_weights_back_even_after_an_error() -> None:
    layer, average = one_weight(4.0), WeightAverage(0.5)
    average.on_train_begin(None, None, None, model=layer)
    layer.weight.data.fill_(0.1)
    during = []

    def fail() -> None:
        with average.applied_to(layer):
            during.append(layer.weight.item())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert during == [4.0]
    assert torch.equal(layer.weight.data, torch.full((1, 1), 0.1))


@pytest.mark.slow
def test_over_a_run(tmp_path: Path) -> None:
    """Three optimizer steps of two micro-batches each: one entry a step, and training goes as it goes without."""
    settings = {"optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 2}
    weights = Weights()
    run = trainer(tmp_path / "with", pairs(12), ema_decay=0.5, callbacks=[weights], dtype=torch.float64, **settings)
    run.train()
    w0, w1, w2, w3 = weights.seen
    expected = w0 / 8 + w1 / 8 + w2 / 4 + w3 / 2
    assert relative(flat_average(run), expected) < 1e-12
    assert relative(w3, expected) > 1e-4  # they are not the same thing
    for decay in (None, 0.0):
        without = trainer(tmp_path / "without", pairs(12), ema_decay=decay, dtype=torch.float64, **settings)
        without.train()
        assert without.average is None
        assert torch.equal(flat_weights(without.model), flat_weights(run.model))


RESUMED = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, "per_device_train_batch_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_resumed_average_is_the_uninterrupted_one(tmp_path: Path, lora: bool) -> None:
    def run(folder: Path) -> MPOTrainer:
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
        torch.manual_seed(3)  # the adapter's random half
        return trainer(folder, pairs(8), ema_decay=0.9, peft_config=adapter, **RESUMED)

    whole = run(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(tmp_path / "cut" / later)
    resumed = run(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.average.averages.keys() == whole.average.averages.keys()
    trained = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    assert whole.average.averages.keys() == trained
    assert all("lora_" in name for name in trained) is lora
    for name, average in whole.average.averages.items():
        assert torch.equal(resumed.average.averages[name], average), name
    saved = load_file(tmp_path / "cut" / "checkpoint-8" / AVERAGE_FILE)
    assert all(torch.equal(saved[name], average) for name, average in whole.average.averages.items())


@pytest.mark.slow
def test_resuming_with_what_is_not_there_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "a", pairs(4), save_strategy="steps", save_steps=1).train()
    with pytest.raises(RunError, match="has no average to continue"):
        trainer(tmp_path / "a", pairs(4), ema_decay=0.5).train(resume_from_checkpoint=True)
    trainer(tmp_path / "b", pairs(4), ema_decay=0.5, save_strategy="steps", save_steps=1).train()
    with pytest.raises(RunError, match=r"is 0\.9, but the average in .*checkpoint-2 was kept with 0\.5"):
        trainer(tmp_path / "b", pairs(4), ema_decay=0.9).train(resume_from_checkpoint=True)
    frozen = tiny_model()
    frozen.model.vision_tower.requires_grad_(False)
    average = WeightAverage(0.5)
    average.start_from(tmp_path / "b" / "checkpoint-2")
    with pytest.raises(RunError, match="of other parameters than those that train"):
        average.on_train_begin(None, None, None, model=frozen)


def test_training_again_starts_a_new_average(tmp_path: Path) -> None:
    """Resumed once, then trained again without: from the weights it finds."""
    layer, average = one_weight(4.0), WeightAverage(0.5)
    average.on_train_begin(None, None, None, model=layer)
    average.save(tmp_path)
    layer.weight.data.fill_(1.0)
    average.start_from(tmp_path)
    average.on_train_begin(None, None, None, model=layer)
    assert average.averages["weight"].item() == 4.0
    average.start_from(None)
    average.on_train_begin(None, None, None, model=layer)
    assert average.averages["weight"].item() == 1.0


def test_no_average_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no average to save"):
        trainer(tmp_path, pairs(2)).save_average(tmp_path / "ema")
    with pytest.raises(RunError, match="no average to save"):
        trainer(tmp_path, pairs(2), ema_decay=0.5).save_average(tmp_path / "ema")


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(RecipeError, match="FSDP and DeepSpeed shard them"):
        WeightAverage.for_run(0.5, sharded=True)
    assert WeightAverage.for_run(0.0, sharded=True) is None


@pytest.mark.parametrize("decay", [1.0, -0.1, "0.9", True])
def test_a_decay_out_of_range_is_refused(tmp_path: Path, decay: Any) -> None:
    with pytest.raises(ValueError, match="ema_decay must be in"):
        MPOConfig(output_dir=str(tmp_path), ema_decay=decay)


@pytest.mark.slow
def test_two_ranks_keep_the_average_of_one(tmp_path: Path) -> None:
    common = {"learning_rate": 1e-2, "optim": "sgd", "ema_decay": 0.5, "save_strategy": "epoch"}
    two_processes(tmp_path, {"two": {"count": 8, "mixed": True, "per_device_train_batch_size": 2, **common}})
    single = trainer(tmp_path / "one", pairs(8), dtype=torch.float64, per_device_train_batch_size=4, **common)
    single.train()
    saved = load_file(tmp_path / "two" / "checkpoint-2" / AVERAGE_FILE)
    found = torch.cat([saved[name].flatten() for name, _ in single.model.named_parameters()])
    assert relative(found, flat_average(single)) < 1e-9


# ---- the run folder ----


@pytest.mark.slow
def test_the_average_is_a_model_of_its_own(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    write_data(tmp_path, records(16))
    recipe = write_recipe(tmp_path, checkpoint, data={"hold_out": 0.25}, training={"ema_decay": 0.5, "seed": 3})
    result = call("train", recipe)
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    raw = flat_weights(AutoModelForImageTextToText.from_pretrained(run))
    averaged = flat_weights(AutoModelForImageTextToText.from_pretrained(run / "ema"))
    AutoProcessor.from_pretrained(run / "ema")
    assert relative(averaged, raw) > 1e-5
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["final_model"]["ema"] == {"decay": 0.5, "step": len(logged(run))}
    # What the run folder holds, and what was evaluated, are the weights themselves: those of a run without.
    other = write_recipe(tmp_path, checkpoint, data={"hold_out": 0.25}, training={"seed": 3})
    assert call("train", other, f"training.output_dir={tmp_path / 'plain'}").exit_code == 0
    assert torch.equal(raw, flat_weights(AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")))
    plain = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    assert manifest["evaluation"] == plain["evaluation"]
    # And the average evaluates like any model.
    result = call("evaluate", recipe, f"evaluate.model={run / 'ema'}")
    assert result.exit_code == 0, result.output
    of_average = json.loads((run / "evaluation" / "evaluation.json").read_text())["pairs"]["held_out"]
    assert of_average["held_out_logps/chosen"] != manifest["evaluation"]["held_out"]["held_out_logps/chosen"]


@pytest.mark.slow
def test_an_averaged_adapter_is_an_adapter(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    write_data(tmp_path, records(8))
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    recipe = write_recipe(tmp_path, checkpoint, model={"lora": lora}, training={"ema_decay": 0.5})
    result = call("train", recipe)
    assert result.exit_code == 0, result.output
    raw, averaged = (load_file(tmp_path / "run" / f / "adapter_model.safetensors") for f in (".", "ema"))
    assert raw.keys() == averaged.keys()
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
    assert not (tmp_path / "run" / "ema" / "README.md").exists()
