"""A resumed run is the run that was not interrupted, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests.tiny_models import model as tiny_model
from tests.training import flat_weights, logged, pairs, trainer
from vlmpo.errors import ModelError, RecipeError, RunError
from vlmpo.train import run_checkpoints
from vlmpo.train import trainer as trainer_module
from vlmpo.train.checkpoint import STATE_FILE, damage, last_complete_checkpoint, load_weights

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
    timing = ("step_seconds", "pairs_per_second", "tokens_per_second", "data_wait_share", "memory_gib")
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
    with pytest.raises(RunError, match=r"checkpoint-2 is damaged: vlmpo_state.json is missing; the newest .*-1: name"):
        trainer(tmp_path, pairs(4)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.slow
def test_a_run_without_a_checkpoint_starts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run" / "_checkpoint.partial" / "checkpoint-1").mkdir(parents=True)  # a kill while it was written
    run = trainer(tmp_path / "run", pairs(2), save_strategy="steps", save_steps=1)
    run.train(resume_from_checkpoint=True)
    assert "there is no checkpoint in" in capsys.readouterr().err
    trainer(tmp_path / "anew", pairs(2)).train()
    same_numbers(logged(tmp_path / "run"), logged(tmp_path / "anew"))
    assert not (tmp_path / "run" / "_checkpoint.partial").exists()


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
    with pytest.raises(RunError, match=r"loss.reward_shift: previous -> none"):
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


# ---- finished, extended, half a window ----


def all_lines(folder: Path) -> list[dict]:
    timing = ("step_seconds", "pairs_per_second", "tokens_per_second", "data_wait_share", "train_runtime", "memory_gib")
    per_second = ("train_samples_per_second", "train_steps_per_second")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in (*timing, *per_second)} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 5])
def test_metrics_between_two_logs_and_the_final_loss_go_on(tmp_path: Path, step: int) -> None:
    """Steps are logged by twos: at every checkpoint here half of what is logged next is done."""
    settings = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "per_device_train_batch_size": 1}
    settings["logging_first_step"] = False
    whole = trainer(tmp_path / "whole", pairs(6), **settings)
    loss = whole.train().training_loss
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in range(step + 1, 7):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{later}")
    assert trainer(tmp_path / "cut", pairs(6), **settings).train(resume_from_checkpoint=True).training_loss == loss
    assert all_lines(tmp_path / "cut") == all_lines(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 4, 5])  # in the middle of an epoch, at its end, fewer than were made
def test_a_finished_run_makes_no_step_more(tmp_path: Path, steps: int) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1}
    first = trainer(tmp_path, pairs(4), max_steps=max(steps, 4) if steps != 3 else 3, **settings)
    first.train()
    for _ in range(2):
        again = trainer(tmp_path, pairs(4), max_steps=min(steps, 4) if steps != 3 else 3, **settings)
        again.train(resume_from_checkpoint=True)
        assert torch.equal(flat_weights(again.model), flat_weights(first.model))
        assert again.state.global_step == first.state.global_step
        assert all_lines(tmp_path)[:-1] == all_lines(tmp_path)[: first.state.global_step]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_more_steps_and_another_rate_take_effect_at_once(tmp_path: Path, schedule: str) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1, "optim": "adamw_torch"}
    settings |= {"lr_scheduler_type": schedule, "weight_decay": 0.01}
    trainer(tmp_path, pairs(4), learning_rate=1e-3, max_steps=2, **settings).train()
    other = {**settings, "weight_decay": 0.5, "adam_beta1": 0.7}
    resumed = trainer(tmp_path, pairs(4), learning_rate=4e-3, max_steps=4, **other)
    resumed.train(resume_from_checkpoint=True)
    scale = {"constant": [1, 1], "linear": [0.5, 0.25], "cosine": [0.5, 0.5 - 2**-1.5]}[schedule]
    rates = [line["learning_rate"] for line in logged(tmp_path)][2:]
    assert rates == pytest.approx([4e-3 * share for share in scale])
    groups = resumed.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert {group["betas"][0] for group in groups} == {0.7}
    assert resumed.checkpoints.history[0]["changes"]["training.learning_rate"] == [1e-3, 4e-3]


# ---- made by other settings ----


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1}
    trainer(folder, pairs(4), **settings).train()
    return folder


OTHER = {
    "beta": ({"beta": 0.2}, "loss.beta: 0.1 -> 0.2"),
    "seed": ({"seed": 8}, "training.seed: 7 -> 8"),
    "weights": ({"loss_weights": {"sigmoid": 1.0}}, 'loss.weights: {"sigmoid": 0.8'),
    "batch": ({"per_device_train_batch_size": 2}, "training.per_device_train_batch_size: 1 -> 2"),
    "accumulation": ({"gradient_accumulation_steps": 3}, "training.gradient_accumulation_steps: 1 -> 3"),
    "tiles": ({"max_tiles": 3}, "data.max_tiles: none -> 3"),
    "optimizer": ({"optim": "sgd"}, "training.optim: adamw_torch"),
    "order": ({"train_sampling_strategy": "sequential"}, "training.train_sampling_strategy: random -> sequential"),
    "adapter": (
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj"])},
        "model.lora: none -> an adapter (LORA, r 4)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER)
def test_what_would_make_the_record_false_is_refused(begun: Path, name: str) -> None:
    change, words = OTHER[name]
    run = trainer(begun, pairs(4), **{"per_device_train_batch_size": 1, **change})
    with pytest.raises(RunError) as refused:
        run.checkpoints.choose(True)
    assert words in str(refused.value)
    assert ("--allow-changes" in str(refused.value)) == (name != "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("data", [pairs(4)[::-1], pairs(3), pairs(4, first=1)], ids=["order", "fewer", "others"])
def test_other_data_is_refused_or_allowed_by_name(begun: Path, data: list) -> None:
    with pytest.raises(
        RunError, match=r"data.train.pairs: 4 pairs, .* -> [34] pairs, .*--allow-changes data.train.pairs"
    ):
        trainer(begun, data, per_device_train_batch_size=1).checkpoints.choose(True)
    allowed = trainer(begun, data, per_device_train_batch_size=1, allow_changes=["data"])
    assert allowed.checkpoints.choose(True) == str(begun / "checkpoint-4")
    assert list(allowed.checkpoints.history[0]["changes"]) == [
        "data.train.pairs",
        "training.save_steps",
        "training.save_strategy",
    ]


@pytest.mark.slow
def test_the_same_global_batch_may_be_cut_otherwise(begun: Path, tmp_path: Path) -> None:
    trainer(tmp_path, pairs(4), per_device_train_batch_size=2, save_strategy="steps", save_steps=1).train()
    other = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    run = trainer(tmp_path, pairs(4), **other)
    assert run.checkpoints.choose(True) == str(tmp_path / "checkpoint-2")
    assert run.checkpoints.history[0]["changes"]["training.per_device_train_batch_size"] == [2, 1]


@pytest.mark.slow
def test_an_unknown_key_that_may_differ_is_refused(begun: Path) -> None:
    run = trainer(begun, pairs(4), per_device_train_batch_size=1, allow_changes=["loss.betta"])
    with pytest.raises(RecipeError, match=r"no setting is called 'loss.betta'; loss\.beta\?"):
        run.checkpoints.choose(True)


ADAPTERS = {
    "r": (LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), "model.lora.r: 4 -> 8"),
    "alpha": (LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"]), "model.lora.lora_alpha: 8 -> 32"),
    "targets": (LoraConfig(r=4, target_modules=["q_proj"]), 'model.lora.target_modules: ["q_proj", "v_proj"] -> ["q_'),
    "none": (None, "model.lora: an adapter (LORA, r 4) -> none"),
}


@pytest.mark.slow
@pytest.mark.parametrize("verified", [True, False], ids=["", "written by 0.1"])
def test_another_adapter_is_named(tmp_path: Path, verified: bool) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer(tmp_path, pairs(2), peft_config=config, save_strategy="steps", save_steps=1).train()
    if not verified:
        file = tmp_path / "checkpoint-1" / STATE_FILE
        state = json.loads(file.read_text())
        old = ("reward_shift", "reference_hash", "accounts", "learning_rates")
        file.write_text(json.dumps({name: state[name] for name in old}))
    for other, words in ADAPTERS.values():
        with pytest.raises(RunError) as refused:
            trainer(tmp_path, pairs(2), peft_config=other).checkpoints.choose(True)
        assert words in str(refused.value)


# ---- damage ----


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "config.json", STATE_FILE])
def test_the_newest_sound_checkpoint_is_taken(begun: Path, tmp_path: Path, name: str, capsys) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4" / name).unlink()
    file = tmp_path / "checkpoint-3" / name
    file.write_bytes(file.read_bytes()[:-2])
    run = trainer(tmp_path, pairs(4), per_device_train_batch_size=1)
    assert run.checkpoints.choose(True) == str(tmp_path / "checkpoint-2")
    said = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert len(said) == 1
    assert f"checkpoint-4 is damaged: {name} is missing; " in said[0]
    assert f"Going on from {tmp_path / 'checkpoint-2'}" in said[0]
    shutil.rmtree(tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(RunError, match=r"no checkpoint in .* can be gone on from: .*checkpoint-4 is damaged"):
        trainer(tmp_path, pairs(4), per_device_train_batch_size=1).checkpoints.choose(True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", STATE_FILE, "config.json"])
def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path: Path, name: str) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}

    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            file = Path(state.best_model_checkpoint) / name
            if state.global_step == 2:
                file.write_bytes(file.read_bytes()[:-3])

    run = trainer(tmp_path, pairs(4), eval_dataset=pairs(2), callbacks=[Damage()], learning_rate=1e-2, **settings)
    with pytest.raises(RunError, match=f"the best checkpoint cannot be loaded: .*checkpoint-. is damaged: {name}"):
        run.train()


@pytest.mark.slow
def test_weights_of_other_shapes_are_refused_without_taking_memory(tmp_path: Path) -> None:
    """The config beside the weights asks for a model of 100 GB; it is not asked."""
    model = tiny_model(seed=5)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"vocab_size": 10_000_000, "hidden_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_weights(tiny_model(seed=6), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name][:-1].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not fit the model"):
        load_weights(tiny_model(seed=6), tmp_path)


# ---- kills while a checkpoint is written ----


class KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["_save_optimizer_and_scheduler", "_save_rng_state", "write_state", "publish", "rotate"]
)
def test_a_kill_while_the_only_checkpoint_is_followed(tmp_path: Path, moment: str, monkeypatch) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "per_device_train_batch_size": 1}
    trainer(tmp_path / "whole", pairs(4), **settings).train()
    run = trainer(tmp_path / "cut", pairs(4), **settings)
    owner = next(o for o in (trainer_module, run_checkpoints, type(run)) if hasattr(o, moment))
    real = getattr(owner, moment)

    def killed(*arguments, **keywords):
        if run.state.global_step == 3:
            raise KilledError
        return real(*arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(owner, moment, killed)
        with pytest.raises(KilledError):
            run.train()
    left = [path for path in (tmp_path / "cut").glob("checkpoint-*") if not damage(path)]
    assert len(left) == (2 if moment == "rotate" else 1)
    resumed = trainer(tmp_path / "cut", pairs(4), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert [path.name for path in (tmp_path / "cut").glob("*checkpoint*")] == ["checkpoint-4"]
    assert all_lines(tmp_path / "cut") == all_lines(tmp_path / "whole")
    for name in ("model.safetensors", "optimizer.pt"):
        mine, theirs = ((tmp_path / folder / "checkpoint-4" / name).read_bytes() for folder in ("cut", "whole"))
        assert mine == theirs
