"""A resumed run is the run that was not interrupted, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.tiny_models import model as tiny_model
from tests.training import flat_weights, logged, pairs, trainer
from vlmpo.errors import ModelError, RunError
from vlmpo.train.checkpoint import STATE_FILE, last_complete_checkpoint, load_weights

SETTINGS = {
    "save_strategy": "steps",
    "save_steps": 3,
    "num_train_epochs": 2,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 1,
}


def same_numbers(mine: list[dict], theirs: list[dict]) -> None:
    timing = ("step_seconds", "pairs_per_second", "tokens_per_second", "data_wait_share")
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("reward_shift", ["previous", "running"])
@pytest.mark.parametrize("last", [3, 6], ids=["first epoch", "second epoch"])
def test_resume_in_the_middle_of_an_epoch(tmp_path: Path, lora: bool, reward_shift: str, last: int) -> None:
    def run(folder: Path):
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
        torch.manual_seed(3)  # the adapter's random half
        return trainer(folder, pairs(8), reward_shift=reward_shift, peft_config=adapter, **SETTINGS)

    whole = run(tmp_path / "whole")
    whole.train()  # 8 steps: 4 an epoch; checkpoints at 3 and 6 (mid-epoch) and 8
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in {3, 6, 8} - set(range(last + 1)):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{later}")
    resumed = run(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))
    assert resumed.reward_shift.state_dict() == whole.reward_shift.state_dict()
    assert abs(whole.reward_shift.value) > 1e-4
    same_numbers(logged(tmp_path / "cut"), logged(tmp_path / "whole"))
    assert resumed.all_pair_counts().to_json() == whole.all_pair_counts().to_json()


@pytest.mark.slow
def test_transformers_own_resume_would_have_lost_the_weights(tmp_path: Path) -> None:
    """Why load_weights exists: the keys written differ from the model's. If this fails, the trap is gone."""
    run = trainer(tmp_path, pairs(4), save_strategy="steps", save_steps=1)
    run.train()
    written = load_file(tmp_path / "checkpoint-2" / "model.safetensors").keys()
    assert not written & run.model.state_dict().keys()


def test_weights_come_back_whole_or_not_at_all(tmp_path: Path) -> None:
    trained = tiny_model(seed=5)
    trained.save_pretrained(tmp_path)
    other = tiny_model(seed=6)
    load_weights(other, tmp_path)
    assert torch.equal(flat_weights(other), flat_weights(trained))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    removed = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != removed}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="missing keys"):
        load_weights(other, tmp_path)
    save_file({**weights, "stranger": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="unexpected keys: stranger"):
        load_weights(other, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path) -> None:
    run = trainer(tmp_path, pairs(4), save_strategy="steps", save_steps=1)
    run.train()
    (tmp_path / "checkpoint-2" / STATE_FILE).unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    with pytest.raises(RunError, match=r"checkpoint-2 is no complete vlmpo checkpoint"):
        trainer(tmp_path, pairs(4)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no complete checkpoint"):
        trainer(tmp_path, pairs(2)).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_another_reference_is_refused(tmp_path: Path) -> None:
    """A resumed policy must not become its own reference."""
    run = trainer(tmp_path, pairs(4), save_strategy="steps", save_steps=1)
    run.train()
    with pytest.raises(RunError, match="a different reference model"):
        trainer(tmp_path, pairs(4), model=run.model).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_another_kind_of_delta_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, pairs(2), save_strategy="steps", save_steps=1).train()
    with pytest.raises(RunError, match="kept in mode 'previous'"):
        trainer(tmp_path, pairs(2), reward_shift="none").train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_lines_after_the_checkpoint_are_not_doubled(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
    trainer(tmp_path, pairs(5), **settings).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    for folder in tmp_path.glob("checkpoint-5"):
        shutil.rmtree(folder)
    trainer(tmp_path, pairs(5), **settings).train(resume_from_checkpoint=True)
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4, 5]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
