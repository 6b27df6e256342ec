"""The final model is the best checkpoint, to the bit, by the metric that was asked for; mistakes are told before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer

from tests.commands.test_train import call, checkpoint, manifest, records, write_data, write_recipe  # noqa: F401  a fixture
from tests.tiny_models import model as tiny_model
from tests.tiny_models import random_pair
from tests.training import flat_weights, pairs, trainer
from vlmpo import MPOTrainer
from vlmpo.errors import RecipeError, RunError
from vlmpo.train.checkpoint import load_weights
from vlmpo.train.config import MPOConfig
from vlmpo.train.metrics import greater_is_better, pair_metric_names, resolve_metric, without_set_name

BEST = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
}


class Scripted:
    """A further evaluation that says what it is told, one value an evaluation."""

    metrics = ("answers/accuracy",)

    def __init__(self, *values: float) -> None:
        self.values = iter(values)

    def __call__(self) -> dict[str, float]:
        return {"answers/accuracy": next(self.values)}


def scripted(folder: Path, *values: float, lora: bool = False, **settings: Any) -> MPOTrainer:
    """A run over as many steps as there are values, its best checkpoint known beforehand."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    given = {**BEST, "metric_for_best_model": "answers/accuracy", "eval_dataset": {}, **settings}
    run = trainer(folder, pairs(2 * len(values)), peft_config=adapter, **given)
    run.extra_evaluations.append(Scripted(*values))
    return run


def weights_in(folder: Path, like: MPOTrainer) -> torch.Tensor:
    load_weights(like.model, folder)
    return flat_weights(like.model)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_final_weights_are_the_best_ones(tmp_path: Path, lora: bool) -> None:
    run = scripted(tmp_path, 0.2, 0.9, 0.5, lora=lora)
    run.train()
    final = flat_weights(run.model)
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert run.final_model() == {
        "step": 2,
        "checkpoint": "checkpoint-2",
        "best_by": {"eval_answers/accuracy": 0.9},
    }
    run.save_model(str(tmp_path / "saved"))
    assert torch.equal(final, weights_in(tmp_path / "checkpoint-2", run))
    assert torch.equal(final, weights_in(tmp_path / "saved", run))
    assert not torch.equal(final, weights_in(tmp_path / "checkpoint-3", run))


@pytest.mark.slow
def test_transformers_own_way_would_have_kept_the_last(tmp_path: Path) -> None:
    """Why _load_best_model is overridden. If this fails, the trap is gone."""
    run = scripted(tmp_path, 0.9, 0.5)
    run.train()
    last = weights_in(tmp_path / "checkpoint-2", run)
    Trainer._load_best_model(run)
    assert torch.equal(flat_weights(run.model), last)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "kept"), [(1, {"checkpoint-2"}), (2, {"checkpoint-2", "checkpoint-4"})])
def test_the_best_one_outlives_the_limit(tmp_path: Path, limit: int, kept: set[str]) -> None:
    run = scripted(tmp_path, 0.2, 0.9, 0.5, 0.6, save_total_limit=limit)
    run.train()
    assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == kept
    final = flat_weights(run.model)
    assert torch.equal(final, weights_in(tmp_path / "checkpoint-2", run))


@pytest.mark.slow
def test_lower_can_be_better(tmp_path: Path) -> None:
    run = scripted(tmp_path, 0.2, 0.9, 0.5, greater_is_better=False)
    run.train()
    assert run.final_step == 1


@pytest.mark.slow
def test_an_evaluation_without_a_checkpoint_is_no_candidate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Step 3 is best of all and not saved: transformers would remember it, find no folder, and keep the last."""
    run = scripted(tmp_path, 0.1, 0.5, 0.9, 0.4, save_steps=2)
    run.train()
    assert "only evaluations at which a checkpoint is saved" in capsys.readouterr().err
    assert run.final_step == 2
    final = flat_weights(run.model)
    assert torch.equal(final, weights_in(tmp_path / "checkpoint-2", run))


@pytest.mark.slow
def test_only_the_best_are_saved_where_asked(tmp_path: Path) -> None:
    run = scripted(tmp_path, 0.2, 0.1, 0.9, save_strategy="best")
    run.train()
    assert not (tmp_path / "checkpoint-2").exists()
    assert run.final_step == 3


@pytest.mark.slow
def test_no_number_no_best_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = scripted(tmp_path, float("nan"), float("nan"))
    run.train()
    assert "NOT the best checkpoint" in capsys.readouterr().err
    assert run.final_model() == {"step": 2, "checkpoint": None}
    final = flat_weights(run.model)
    assert torch.equal(final, weights_in(tmp_path / "checkpoint-2", run))


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_not_finite_is_never_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture, value: float
) -> None:
    """As the first one NaN would stay the best for ever: nothing is above it."""
    run = scripted(tmp_path, value, 0.4, 0.2)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert f"eval_answers/accuracy is {value} at step 1: it is not the best" in capsys.readouterr().err


@pytest.mark.slow
def test_the_best_survives_a_resume(tmp_path: Path) -> None:
    scripted(tmp_path, 0.9, 0.5, 0.6, save_total_limit=2).train()
    more = {"save_total_limit": 2, "allow_changes": ["data.train"]}
    resumed = scripted(tmp_path, 0.1, 0.2, 0.3, 0.4, num_train_epochs=1, **more)  # one pair and step more: 0.1
    resumed.train(resume_from_checkpoint=True)
    assert resumed.final_step == 1
    final = flat_weights(resumed.model)
    assert torch.equal(final, weights_in(tmp_path / "checkpoint-1", resumed))


# ---- names ----


def test_names_known_beforehand_are_those_an_evaluation_gives(tmp_path: Path) -> None:
    for weights in ({"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0}, {"nll": 1.0}):
        run = trainer(tmp_path, pairs(2), loss_weights=weights)
        data = [random_pair(seed, images=0, source="ab"[seed % 2]) for seed in range(12)]
        found = {name.removeprefix("eval_") for name in run.evaluate(data)} - {"epoch"}
        assert found == set(pair_metric_names(weights, ["a", "b"]))
        of_one = set(pair_metric_names(weights, ["a"]))
        assert found - of_one == {name for name in found if name.endswith(("/a", "/b"))}


def settled(folder: Path, evaluation: Any, metric: str | None) -> str | None:
    run = trainer(folder, pairs(2), eval_dataset=evaluation, metric_for_best_model=metric, **BEST)
    run.settle_best_metric()
    return run.args.metric_for_best_model


def test_names_with_one_set_and_with_several(tmp_path: Path) -> None:
    one, several = pairs(2), {"eval": pairs(2), "held_out": pairs(2)}
    assert settled(tmp_path, one, None) == "eval_loss"
    assert settled(tmp_path, one, "rewards/accuracies") == "eval_rewards/accuracies"
    assert settled(tmp_path, one, "eval_loss/nll") == "eval_loss/nll"
    assert settled(tmp_path, several, None) == "eval_eval_loss"
    assert settled(tmp_path, several, "eval_rewards/margins") == "eval_eval_rewards/margins"
    assert settled(tmp_path, several, "held_out_rewards/accuracies_low") == "eval_held_out_rewards/accuracies_low"
    assert settled(tmp_path, one, "rewards/accuracies/any") == "eval_rewards/accuracies/any"  # sources not known
    with pytest.raises(RecipeError, match=r"gives 'rewards/accuracies'; did you mean .*There are: eval_a_loss, "):
        settled(tmp_path, {"a": one, "b": one}, "rewards/accuracies")
    for metric, name in (("held_out_loss", "held_out"), ("eval_held_out_loss", "held_out"), ("eval_loss", "held_out")):
        assert without_set_name(metric, name) == "eval_loss"
    assert without_set_name("eval_loss", "eval") == "eval_loss"
    assert without_set_name(None, "eval") is None
    assert resolve_metric("answers/accuracy/anls", ["eval_answers/accuracy/*"]) == "eval_answers/accuracy/anls"
    with pytest.raises(RecipeError, match="no evaluation of this run gives"):
        resolve_metric("answers/accuracy/", ["eval_answers/accuracy/*"])


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("loss", False),
        ("eval_loss", False),
        ("eval_loss/nll", False),  # transformers: higher, for it does not end in "loss"
        ("eval_held_out_loss/bco_pair", False),
        ("eval_rewards/accuracies", True),
        ("held_out_rewards/accuracies_low", True),
        ("rewards/accuracies/no_loss", True),
        ("eval_rewards/margins/data", True),
        ("eval_rewards/rejected", False),
        ("eval_logps/chosen", True),
        ("eval_answers/accuracy", True),
        ("eval_answers/unparsed", False),
    ],
)
def test_which_way_is_better(tmp_path: Path, metric: str, higher: bool) -> None:
    assert greater_is_better(metric) is higher
    assert MPOConfig(output_dir=str(tmp_path), metric_for_best_model=metric).greater_is_better is higher
    other = MPOConfig(output_dir=str(tmp_path), metric_for_best_model=metric, greater_is_better=not higher)
    assert other.greater_is_better is not higher  # who says it is believed


@pytest.mark.slow
def test_a_name_that_does_not_tell_is_asked_about(tmp_path: Path) -> None:
    asked = {"metric_for_best_model": "lengths/chosen", "eval_dataset": pairs(2), **BEST}
    with pytest.raises(RecipeError, match=r"Set training\.greater_is_better"):
        trainer(tmp_path, pairs(2), **asked).train()
    run = trainer(tmp_path, pairs(2), greater_is_better=False, **asked)
    run.train()
    assert run.final_step == 1


@pytest.mark.slow
def test_a_metric_that_does_not_come_is_told(tmp_path: Path) -> None:
    """Known beforehand, but of these two pairs none is of similar length."""
    data = [random_pair(seed, images=0) for seed in range(40)]
    unlike = [p for p in data if min(len(p.chosen), len(p.rejected)) * 3 < max(len(p.chosen), len(p.rejected))]
    metric = "rewards/accuracies_similar_length"
    run = trainer(tmp_path, pairs(2), eval_dataset=unlike, metric_for_best_model=metric, **BEST)
    with pytest.raises(RunError, match=r"gave no eval_rewards/accuracies_similar_length; it gave .*eval_loss"):
        run.train()


# ---- from a recipe ----


@pytest.mark.slow
def test_a_run_from_a_recipe(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    write_data(tmp_path, records(16))
    training = {**BEST, "metric_for_best_model": "held_out_loss", "eval_steps": 2, "save_steps": 2}
    training |= {"greater_is_better": True}  # the worst, that is: falling all the way, the last would be the best
    result = call("train", write_recipe(tmp_path, checkpoint, data={"hold_out": 0.25}, training=training))
    assert result.exit_code == 0, result.output
    written = manifest(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = {line["step"]: line for line in lines if "eval_loss" in line}
    best = max(seen, key=lambda step: seen[step]["eval_loss"])
    assert best != max(seen)  # or this test would show nothing
    assert written["final_model"] == {
        "step": best,
        "checkpoint": f"checkpoint-{best}",
        "best_by": {"eval_loss": seen[best]["eval_loss"]},
    }
    # The evaluation at the end is that of the best step, number by number: weights and delta are what they were then.
    at_the_end = written["evaluation"]["held_out"]
    assert len(at_the_end) > 15
    for name, value in at_the_end.items():
        if name != "epoch":
            assert value == seen[best][f"eval_{name.removeprefix('held_out_')}"], name
    mine, saved = tiny_model(), tiny_model(seed=1)
    load_weights(mine, tmp_path / "run" / f"checkpoint-{best}")
    load_weights(saved, tmp_path / "run")
    assert torch.equal(flat_weights(mine), flat_weights(saved))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.metric_for_best_model=eval_rewards/acuracies"], "did you mean eval_rewards/accuracies?"),
        (["training.metric_for_best_model=eval_answers/accuracy"], "no evaluation of this run gives"),
        (["training.metric_for_best_model=lengths/chosen"], "Set training.greater_is_better"),
        (["training.save_strategy=epoch"], "requires the save and eval strategy to match"),
        (["training.save_steps=3", "training.eval_steps=2"], "training: "),
        (["training.eval_strategy=no", "training.load_best_model_at_end=false"], "nothing is evaluated while training"),
        (["data.hold_out=0.0"], "nothing to evaluate on; give data.eval"),
        (
            ["training.save_strategy=best", "training.load_best_model_at_end=false", "training.metric_for_best_model="],
            "best by what?",
        ),
    ],
)
def test_mistakes_are_told_before_training(
    tmp_path: Path,
    checkpoint: Path,  # noqa: F811
    overrides: list[str],
    words: str,
) -> None:
    write_data(tmp_path, records(8))
    training = {**BEST, "metric_for_best_model": "loss"}
    recipe = write_recipe(tmp_path, checkpoint, data={"hold_out": 0.25}, training=training)
    result = call("train", recipe, *overrides)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "manifest.json").exists()  # nothing stands in the way of the mended recipe


@pytest.mark.slow
def test_evaluating_needs_no_training_settings(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    """A recipe that trained with all of them is one to evaluate with."""
    write_data(tmp_path, records(8))
    training = {**BEST, "metric_for_best_model": "loss", "eval_steps": 2, "save_steps": 2}
    training |= {"learning_rates": {"vision": 1e-4}, "ema_decay": 0.5}
    recipe = write_recipe(tmp_path, checkpoint, data={"hold_out": 0.25}, training=training)
    for command in ("train", "evaluate"):
        result = call(command, recipe)
        assert result.exit_code == 0, result.output
