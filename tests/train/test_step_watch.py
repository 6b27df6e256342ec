"""Numbers that are not finite stop a run before the weights move, and the message says which, of which pairs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.ranks import spoil
from tests.tiny_models import model as tiny_model
from tests.training import AfterSteps, flat_weights, pairs, trainer
from vlmpo import MPOTrainer
from vlmpo.errors import ModelError, RunError
from vlmpo.loss import mpo_loss
from vlmpo.train.callbacks import BeforeFirstStep
from vlmpo.train.step_watch import MAX_OVERFLOWS, PairNumbers, StepReport, StepWatch, non_finite_error

NAN, INF = math.nan, math.inf


def pair(line: int, chosen: float = -1.5, reference: float = -2.0) -> PairNumbers:
    return PairNumbers(f"a.jsonl:{line}", {"policy chosen": chosen, "reference chosen": reference})


def message(ranks: list[StepReport], **changes: Any) -> list[str]:
    settings = {"step": 7, "grad_norm": NAN, "overflows": 0, "checkpoint": None, "moved": False, **changes}
    return str(non_finite_error(ranks, **settings)).splitlines()


def test_the_message_names_the_worst_pairs_first_and_counts_the_rest() -> None:
    first = StepReport([pair(line) for line in range(1, 8)], {"loss": 0.25, "nll": 0.5})
    second = StepReport([pair(20, chosen=-INF), pair(21), pair(22, chosen=NAN)], {"loss": NAN, "nll": NAN})
    head, *shown, more, terms, checkpoint, remedy = message([first, second], checkpoint="run/checkpoint-5")
    assert head == (
        "step 7: log-probs of the policy are not finite in 2 of its 10 pairs; the run stops before the weights move"
    )
    assert shown[0] == "  a.jsonl:20: policy chosen -inf, reference chosen -2"
    assert shown[1] == "  a.jsonl:22: policy chosen nan, reference chosen -2"
    assert shown[2] == "  a.jsonl:1: policy chosen -1.5, reference chosen -2"
    assert len(shown) == 8
    assert more == "  and 2 more pairs"
    assert terms == "  loss nan, nll nan, gradient norm nan"
    assert checkpoint == "  last checkpoint: run/checkpoint-5"
    assert "training.learning_rate" in remedy
    assert remedy.endswith("resume with training.resume_from_checkpoint=true")


def test_the_message_says_which_quantity_it_was() -> None:
    of_reference = message([StepReport([pair(1, reference=NAN)], {"loss": NAN})])
    assert of_reference[0].startswith("step 7: log-probs of the reference are not finite in 1 of its 1 pairs")
    assert "reference.cache_dir" in of_reference[-1]
    of_both = message([StepReport([pair(1, chosen=NAN, reference=NAN)])])
    assert "log-probs of the policy and reference are not finite" in of_both[0]
    of_loss = message([StepReport([pair(1)], {"loss": INF, "sigmoid": INF, "nll": 2.0})])
    assert of_loss[0].startswith("step 7: the loss is not finite (loss, sigmoid); ")
    assert of_loss[2] == "  loss inf, sigmoid inf, nll 2, gradient norm nan"
    of_gradient = message([StepReport([pair(1)], {"loss": 0.5})], grad_norm=INF)
    assert of_gradient[0].startswith("step 7: the gradient is not finite, though loss and log-probs are")
    assert "  last checkpoint: there is none yet" in of_gradient
    assert of_gradient[-1].endswith("; then start anew")
    assert "DeepSpeed has made the step already" in message([StepReport([pair(1)])], moved=True)[0]


def test_a_loss_scaler_may_skip_twenty_steps_in_a_row() -> None:
    watch = StepWatch()
    assert not watch.excuses(finite=False, scaled=False)
    for _ in range(3):
        assert all(watch.excuses(finite=False, scaled=True) for _ in range(MAX_OVERFLOWS))
        assert watch.excuses(finite=True, scaled=True)
    assert all(watch.excuses(finite=False, scaled=True) for _ in range(MAX_OVERFLOWS))
    assert not watch.excuses(finite=False, scaled=True)
    assert watch.skipped == 4 * MAX_OVERFLOWS + 1
    told = message([StepReport([pair(1)], {"loss": 0.5})], overflows=watch.overflows)
    assert "21 steps in a row in fp16" in told[0]
    assert "training.bf16: true" in told[-1]


def seen(policy: list[float], reference: list[float]) -> tuple[float, torch.Tensor]:
    """The guarded loss and the gradient of two pairs' log-probs: chosen 0 and 1, rejected 2 and 3."""
    at = torch.tensor([0, 1]), torch.tensor([2, 3])
    part: Any = SimpleNamespace(chosen=at[0], rejected=at[1], origins=["a:1", "a:2"])
    logps = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor(reference, dtype=torch.float64)
    output = mpo_loss(logps[at[0]], logps[at[1]], fixed[at[0]], fixed[at[1]], torch.tensor([3, 4]))
    loss = StepWatch().guarded(part, logps, fixed, output)
    loss.backward()
    assert torch.equal(loss.detach(), output.loss.detach()) or not torch.isfinite(loss)
    return float(loss), logps.grad


def test_a_finite_loss_and_its_gradient_are_left_bit_for_bit() -> None:
    loss, gradient = seen([-3.0, -4.5, -5.0, -2.0], [-3.5, -4.0, -5.5, -2.5])
    logps = torch.tensor([-3.0, -4.5, -5.0, -2.0], dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor([-3.5, -4.0, -5.5, -2.5], dtype=torch.float64)
    plain = mpo_loss(logps[:2], logps[2:], fixed[:2], fixed[2:], torch.tensor([3, 4])).loss
    plain.backward()
    assert loss == float(plain)
    assert torch.equal(gradient, logps.grad)


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_whatever_is_not_finite_shows_in_the_gradient(at: int, value: float) -> None:
    """Also a rejected response of probability 0, of which the loss itself is finite."""
    good = [-3.0, -4.5, -5.0, -2.0]
    bad = [*good[:at], value, *good[at + 1 :]]
    assert not seen(bad, good)[1].isfinite().all()
    assert not seen(good, bad)[1].isfinite().all()


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 1.0},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "many rows": {"max_tokens_per_row": 60},
    "bf16": {"bf16": True},
    "running": {"reward_shift": "running"},
    "lora": {"peft_config": LoraConfig(r=4, target_modules=["q_proj"])},
    "sft": {"loss_weights": {"nll": 1.0}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("what", ["policy", "reference", "loss", "gradient"])
def test_a_run_stops_before_its_weights_move(tmp_path: Path, name: str, what: str) -> None:
    if name == "sft" and what == "reference":
        pytest.skip("there is none")
    weights: list[torch.Tensor] = []
    settings = {"train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 1, **RUNS[name]}
    after = AfterSteps(lambda _: weights.append(flat_weights(run.model)))
    run = trainer(tmp_path, pairs(8), callbacks=[after], **settings)
    spoil(run, what, 3, origin="memory:5")
    with pytest.raises(RunError) as raised:
        run.train()
    assert len(weights) == run.state.global_step == 2
    assert torch.equal(flat_weights(run.model), weights[-1])
    assert math.isfinite(run.reward_shift.value)
    head, first, second, *rest = str(raised.value).splitlines()
    assert head.startswith("step 3: ")
    if what in ("policy", "reference"):
        assert f"log-probs of the {what} are not finite in 1 of its 2 pairs" in head
        assert first.startswith("  memory:5: ")
        assert f"{what} chosen nan" in first
    assert {first[:11], second[:11]} == {"  memory:4:", "  memory:5:"}
    assert f"  last checkpoint: {tmp_path / 'checkpoint-2'}" in rest


def with_scaler(folder: Path, monkeypatch: pytest.MonkeyPatch, spoilt_steps: set[int], **settings: Any) -> MPOTrainer:
    """A run under the loss scaler that fp16 has on a GPU, without the fp16; the gradient of some steps overflows."""
    run = trainer(folder, pairs(6), optim="sgd", optim_args="momentum=0.9", **settings)
    accelerator = run.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "no")

    def say_fp16() -> None:  # once the model is prepared, so that nothing is computed in it
        accelerator.native_amp = True
        monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")

    run.add_callback(BeforeFirstStep(say_fp16))
    due = lambda: run.state.global_step + 1 in spoilt_steps  # noqa: E731
    run.model.lm_head.weight.register_hook(lambda grad: grad * INF if due() else grad)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_that_a_scaler_skips_moves_nothing_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_grad_norm: float
) -> None:
    seen: list[tuple[torch.Tensor, float]] = []
    run = with_scaler(
        tmp_path, monkeypatch, {2, 3, 5}, num_train_epochs=2, lr_scheduler_type="linear", max_grad_norm=max_grad_norm
    )
    run.add_callback(AfterSteps(lambda _: seen.append((flat_weights(run.model), run.lr_scheduler.get_last_lr()[0]))))
    run.train()
    moved = [not torch.equal(one[0], other[0]) for one, other in itertools.pairwise(seen)]
    assert moved == [False, False, True, False, True]
    scheduled = [one[1] != other[1] for one, other in itertools.pairwise(seen)]
    assert scheduled == moved
    assert flat_weights(run.model).isfinite().all()
    assert run.watch.numbers.skipped == 3
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail).get("grad_norm", 0) is None for line in lines] == [
        *(False, True, True, False, True, False),
        False,
    ]


@pytest.mark.slow
def test_the_21st_step_in_a_row_that_a_scaler_skips_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_scaler(tmp_path, monkeypatch, set(range(4, 100)), num_train_epochs=9)
    with pytest.raises(RunError, match=r"step 24: .* 21 steps in a row in fp16"):
        run.train()
    assert run.state.global_step == 3 + MAX_OVERFLOWS


@pytest.mark.slow
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, value: float) -> None:
    def damage(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                run.model.lm_head.weight[5, 7] = value

    run = trainer(tmp_path, pairs(8), callbacks=[AfterSteps(damage)], save_strategy="steps", save_steps=1)
    with pytest.raises(RunError) as raised:
        run.train()
    assert "step 2: weight lm_head.weight has 1 non-finite values of " in str(raised.value)
    assert f"the model is not saved, the last checkpoint is {tmp_path / 'checkpoint-1'}" in str(raised.value)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    with pytest.raises(RunError, match=r"lm_head\.weight"):
        run.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["policy", "reference", "adapter"])
def test_models_given_as_objects_are_looked_at_before_the_first_step(tmp_path: Path, which: str) -> None:
    """Not blamed on the family, whose log-probs would differ by NaN from its own."""
    bad = tiny_model()
    extra = {"ref_model": bad, "model": tiny_model()} if which == "reference" else {"model": bad}
    weight = bad.model.language_model.norm.weight
    if which == "adapter":
        extra["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"])
    run = trainer(tmp_path, pairs(2), **extra)
    if which == "adapter":
        weight = next(p for name, p in run.model.named_parameters() if "lora_A" in name)
    with torch.no_grad():
        weight.flatten()[0] = NAN
    what = {"policy": "model ", "reference": "reference model ", "adapter": "model "}[which]
    name = "lora_A" if which == "adapter" else "norm.weight"
    with pytest.raises(ModelError, match=rf"^{what}\S+: weight \S*{name}\S* has 1 non-finite values of "):
        run.train()
