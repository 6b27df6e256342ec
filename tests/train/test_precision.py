"""Which precision a run is trained in, what it says of it, and that all that reads the model reads the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file

from tests.tiny_models import model as tiny_model
from tests.tiny_models import processor
from tests.train.test_ranks import in_one_process, two_processes
from tests.training import Gradients, config, flat_weights, logged, pairs, relative, trainer
from vlmpo import compat, response_logps
from vlmpo.errors import RecipeError, RunError
from vlmpo.models.masters import HALF, round_weights
from vlmpo.train.checkpoint import read_state
from vlmpo.train.config import asked_precision
from vlmpo.train.precision import choose_precision, recorded_precision
from vlmpo.train.provenance import changes, precision_of, run_settings

SAVED = {"save_strategy": "steps", "save_steps": 1, "precision": "bf16"}
FAST = {True: "has", False: "lacks"}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say whether the hardware is fast at bf16."""
    return lambda yes: monkeypatch.setattr(compat, "has_fast_bf16", lambda device: yes)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    lines: list[str] = []
    monkeypatch.setattr("vlmpo.train.precision.logger.info", lines.append)
    return lines


# ---- what is asked for ----


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        (("auto", None, False), "auto"),
        (("auto", True, False), "bf16"),
        (("auto", False, False), "float32"),
        (("auto", None, True), "autocast"),
        (("auto", False, True), "autocast"),
        (("float32", None, False), "float32"),
        (("float32", False, False), "float32"),
        (("bf16", True, False), "bf16"),
        (("autocast", True, False), "autocast"),
        (("autocast", False, True), "autocast"),
    ],
)
def test_what_the_settings_ask_for(settings: tuple[str, bool | None, bool], asked: str) -> None:
    assert asked_precision(*settings) == asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "float32", "bf16": True}, "precision: float32 contradicts bf16: true"),
        ({"precision": "bf16", "bf16": False}, "precision: bf16 contradicts bf16: false"),
        ({"precision": "autocast", "bf16": False}, "precision: autocast contradicts bf16: false"),
        ({"precision": "bf16", "fp16": True}, "precision: bf16 contradicts fp16: true"),
        ({"precision": "float32", "fp16": True}, "precision: float32 contradicts fp16: true"),
        ({"bf16": True, "fp16": True}, "bf16: true contradicts fp16: true"),
        ({"bf16_full_eval": True}, "bf16_full_eval: evaluations compute as training does"),
        ({"precision": "fp8"}, "precision must be one of auto, float32, bf16, autocast, not 'fp8'"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_a_launchers_setting_counts_if_nothing_else_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert asked_precision("auto", None, False) == "bf16"
    assert asked_precision("auto", False, False) == asked_precision("float32", None, False) == "float32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what it sets by default
    assert asked_precision("auto", None, False) == "auto"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(RecipeError, match="mixed_precision: fp8, which the launcher asks for"):
        choose_precision(config(tmp_path), tiny_model(), None)


# ---- what is chosen ----


@pytest.mark.parametrize("yes", [True, False])
def test_the_hardware_decides(tmp_path: Path, fast: Callable[[bool], None], said: list[str], yes: bool) -> None:
    fast(yes)
    args = config(tmp_path)
    chosen = choose_precision(args, tiny_model(), None)
    assert (chosen, args.mixed_precision) == ("bf16" if yes else "float32", "no")
    (line,) = said
    assert line.startswith(
        "precision: bf16 passes over float32 weights" if yes else "precision: float32 (this cpu lacks"
    )
    assert f"this cpu {FAST[yes]} fast bf16" in line


def test_what_is_asked_for_goes_before_the_hardware(
    tmp_path: Path, fast: Callable[[bool], None], said: list[str]
) -> None:
    for yes in (True, False):
        fast(yes)
        for settings, chosen, by_accelerate in (
            ({"precision": "float32"}, "float32", "no"),
            ({"bf16": False}, "float32", "no"),
            ({"precision": "bf16"}, "bf16", "no"),
            ({"bf16": True}, "bf16", "no"),
            ({"precision": "autocast"}, "autocast", "bf16"),
            ({"precision": "autocast", "fp16": True}, "autocast", "fp16"),
            ({"fp16": True}, "autocast", "fp16"),
        ):
            args = config(tmp_path, **settings)
            assert choose_precision(args, tiny_model(), None) == chosen
            assert args.mixed_precision == by_accelerate
    asked_for = "(training.bf16)", "(fp16 is for GPUs; on a CPU it converts nothing)"
    assert all(line.endswith(asked_for) for line in said)  # what was asked for, and is done, needs no reason
    assert len(said) == 2 * 3


def test_models_of_other_weights_are_left_as_they_were(
    tmp_path: Path, fast: Callable[[bool], None], said: list[str]
) -> None:
    fast(True)
    for dtype in (HALF, torch.float64):
        name, model = str(dtype).removeprefix("torch."), tiny_model(dtype=dtype)
        assert choose_precision(config(tmp_path), model, None) == name
        assert choose_precision(config(tmp_path, bf16=False), model, None) == name
        assert not said
        args = config(tmp_path, bf16=True)
        assert (choose_precision(args, model, None), args.mixed_precision) == ("autocast", "bf16")
        assert said.pop() == (
            f"precision: autocast over the weights as they are (there are no float32 weights: {name})"
        )
        for asked in ("bf16", "float32"):
            with pytest.raises(
                RecipeError, match=f"training.precision: {asked} needs float32 weights, these are {name}"
            ):
                choose_precision(config(tmp_path, precision=asked), model, None)
    quantised = tiny_model()
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    args = config(tmp_path, bf16=True)
    assert (choose_precision(args, quantised, None), args.mixed_precision) == ("autocast", "bf16")
    assert choose_precision(config(tmp_path), quantised, None) == "quantised"
    with pytest.raises(RecipeError, match="these are quantised; set precision: autocast"):
        choose_precision(config(tmp_path, precision="bf16"), quantised, None)


def test_an_adapter_with_matrices_of_its_own_is_under_autocast(
    tmp_path: Path, fast: Callable[[bool], None], said: list[str]
) -> None:
    """PEFT's VeRA multiplies states by buffers, which no rounding is put in the place of."""
    adapted = get_peft_model(tiny_model(), VeraConfig(r=2, target_modules=["q_proj"]))
    for yes, settings, chosen in (
        (True, {}, "autocast"),
        (True, {"bf16": True}, "autocast"),
        (True, {"precision": "float32"}, "float32"),
        (False, {}, "float32"),
    ):
        fast(yes)
        args = config(tmp_path, **settings)
        assert choose_precision(args, adapted, None) == chosen
        assert args.mixed_precision == ("bf16" if chosen == "autocast" else "no")
    assert "(for a VeRA adapter, whose random matrices" in said[0]
    with pytest.raises(RecipeError, match=r"training.precision: bf16 cannot read a VeRA adapter"):
        choose_precision(config(tmp_path, precision="bf16"), adapted, None)


# ---- going on ----


@pytest.mark.parametrize(
    ("before", "yes", "settings", "chosen"),
    [
        ("float32", True, {}, "float32"),
        ("bf16", False, {}, "bf16"),
        ("autocast", True, {}, "autocast"),
        ("autocast", True, {"bf16": True}, "autocast"),  # what this meant before there was a choice
        ("bf16", True, {"bf16": True}, "bf16"),
        ("float32", True, {"precision": "bf16"}, "bf16"),  # to be refused, or allowed, when settings are compared
        ("bfloat16", True, {}, "bf16"),
    ],
)
def test_a_run_goes_on_as_it_began(
    tmp_path: Path,
    fast: Callable[[bool], None],
    said: list[str],
    before: str,
    yes: bool,
    settings: dict[str, Any],
    chosen: str,
) -> None:
    fast(yes)
    assert choose_precision(config(tmp_path, **settings), tiny_model(), (before, "checkpoint-3")) == chosen
    if chosen == before:
        assert "as in checkpoint-3" in said[-1]
        assert ("this cpu is slow at it" in said[-1]) == (not yes)


def test_what_was_made_before_there_was_a_choice() -> None:
    assert precision_of({"training.bf16": True, "training.fp16": False}) == "autocast"
    assert precision_of({"training.bf16": False, "training.fp16": True}) == "autocast"
    old = {"training.bf16": False, "training.fp16": False}
    assert precision_of(old) == "float32"
    assert precision_of({"model.lora": None}) is None
    assert changes(old, {"training.precision": "bf16"}) == {"training.precision": ("float32", "bf16")}
    for now in ("float32", "bfloat16", "float64", "quantised"):
        assert changes(old, {"training.precision": now}) == {}
    assert changes({"training.bf16": True}, {"training.precision": "bf16"}) == {
        "training.precision": ("autocast", "bf16")
    }


def test_a_manifest_tells_if_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert recorded_precision(str(tmp_path)) is None
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": {"training.bf16": True}}))
    assert recorded_precision(str(tmp_path)) == ("autocast", str(tmp_path / "manifest.json"))
    assert recorded_precision(str(tmp_path), resume=None) is None
    (tmp_path / "manifest.json").write_text('{"settings": null}')
    assert recorded_precision(str(tmp_path)) is None


# ---- trained ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copy", "given", "cache", "adapter", "frozen tower"])
def test_the_first_rewards_are_zero(tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"precision": "bf16"}
    if kind == "given":
        settings["ref_model"] = tiny_model()
    elif kind == "adapter":
        settings["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.0)
    elif kind == "cache":
        settings |= {"reference_kind": "cache", "reference_cache_dir": str(tmp_path / "store")}
    elif kind == "frozen tower":
        settings["model"] = tiny_model()
        settings["model"].model.vision_tower.requires_grad_(False)
        settings["model"].model.multi_modal_projector.requires_grad_(False)
    run = trainer(tmp_path, pairs(6), **settings)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    first = logged(tmp_path)[0]
    assert (first["rewards/chosen"], first["rewards/rejected"], first["rewards/margins"]) == (0.0, 0.0, 0.0)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert moved
    assert moved <= trained
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    if kind in ("copy", "given", "frozen tower"):
        assert {p.dtype for p in run.reference.model.parameters()} == {HALF}
        assert trainer(tmp_path / "again", pairs(2), precision="float32").reference.weights_hash() == (
            run.reference.weights_hash()
        )  # it names the weights that were given


def test_a_given_reference_stays_as_it_is(tmp_path: Path) -> None:
    """It may be given to a second run, and a frozen tower may belong to it and to the policy."""
    model, given = tiny_model(), tiny_model()
    given.model.vision_tower = model.model.vision_tower.requires_grad_(False)
    weights = [(weight, weight.detach().clone()) for weight in (*model.parameters(), *given.parameters())]
    first, second = (
        trainer(tmp_path, pairs(2), model=model, ref_model=given, precision=precision)
        for precision in ("bf16", "float32")
    )
    for weight, before in weights:
        assert torch.equal(weight, before)
        assert weight.dtype == torch.float32
    assert {weight.dtype for weight in first.reference.model.parameters()} == {HALF}
    assert first.reference.weights_hash() == second.reference.weights_hash()


@pytest.mark.slow
def test_gradients_are_those_of_autocast_but_for_rounding(tmp_path: Path) -> None:
    steps = {}
    for precision in ("float32", "autocast", "bf16"):
        kept = Gradients()
        settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "max_tokens_per_row": 64}
        trainer(tmp_path / precision, pairs(8), precision=precision, callbacks=[kept], **settings).train()
        (steps[precision],) = kept.steps
    assert relative(steps["bf16"], steps["float32"]) < 0.05
    assert relative(steps["bf16"], steps["float32"]) < 2 * relative(steps["autocast"], steps["float32"])


@pytest.mark.slow
def test_saved_and_gone_on_with_to_the_bit(tmp_path: Path, fast: Callable[[bool], None]) -> None:
    """Also where the setting is left open, and the machine is slow at bf16."""
    whole = trainer(tmp_path / "whole", pairs(8), **SAVED)
    whole.train()
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert read_state(tmp_path / "whole" / "checkpoint-2")["settings"]["training.precision"] == "bf16"
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    fast(False)
    settings = {**SAVED, "precision": "auto", "resume_from_checkpoint": True}
    resumed = trainer(tmp_path / "cut", pairs(8), **settings)
    assert resumed.precision == "bf16"
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))
    with pytest.raises(RunError, match=r"training.precision: bf16 -> float32"):
        trainer(tmp_path / "cut", pairs(8), **{**SAVED, "precision": "float32"}).train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [None, True])
def test_a_checkpoint_from_before_stays_in_its_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: Callable[[bool], None], bf16: bool | None
) -> None:
    """As it was written then: nothing said of precision, bf16 being autocast."""
    fast(True)
    made_in = "autocast" if bf16 else "float32"
    old = trainer(tmp_path, pairs(4), **{**SAVED, "precision": made_in})
    del old.given_settings["training.precision"]
    monkeypatch.setattr(
        "vlmpo.train.trainer.run_settings",
        lambda *given: {k: v for k, v in run_settings(*given).items() if k != "training.precision"},
    )
    old.train()
    monkeypatch.undo()
    fast(True)
    assert "training.precision" not in read_state(tmp_path / "checkpoint-1")["settings"]
    shutil.rmtree(tmp_path / "checkpoint-2")
    settings = {**SAVED, "precision": "auto", "bf16": bf16, "resume_from_checkpoint": True}
    resumed = trainer(tmp_path, pairs(4), **settings)
    assert resumed.precision == made_in
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(flat_weights(resumed.model), flat_weights(old.model))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_evaluation_and_scoring_read_what_training_reads(tmp_path: Path, lora: bool) -> None:
    held_out = pairs(4, first=50)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if lora else None
    run = trainer(tmp_path, pairs(6), precision="bf16", eval_dataset=held_out, peft_config=adapter)
    run.train()
    metrics = run.evaluate()
    scores = torch.tensor(response_logps(run.model, processor(), held_out))
    assert metrics["eval_logps/chosen"] == pytest.approx(float(scores[:, 0].mean()), rel=1e-6)
    if not lora:
        alone = tiny_model()
        alone.load_state_dict(run.model.state_dict())
        round_weights(alone)
        assert torch.equal(torch.tensor(response_logps(alone, processor(), held_out)), scores)


@pytest.mark.slow
def test_optimizers_that_hide_their_steps_are_followed(tmp_path: Path) -> None:
    """As bitsandbytes' do: they write through pointers, and no version of a weight tells."""

    class Hidden(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.data.add_(weight.grad, alpha=-group["lr"])

    plain = trainer(tmp_path / "plain", pairs(6), precision="bf16", optim="sgd")
    plain.train()
    model = tiny_model()
    hidden = trainer(
        tmp_path / "hidden",
        pairs(6),
        model=model,
        precision="bf16",
        optimizers=(Hidden(model.parameters(), 1e-3), None),
    )
    hidden.train()
    assert torch.equal(flat_weights(hidden.model), flat_weights(plain.model))
    assert hidden.evaluate(pairs(2, first=50)) == plain.evaluate(pairs(2, first=50))


@pytest.mark.slow
def test_one_model_trained_in_one_precision_after_the_other(tmp_path: Path) -> None:
    """Each time as a fresh model would be: accelerate would leave a model alone that it knows."""
    model = tiny_model()
    given = {name: weight.clone() for name, weight in model.state_dict().items()}
    for number, precision in enumerate(("float32", "autocast", "bf16", "autocast", "float32")):
        model.load_state_dict(given)
        again = trainer(tmp_path / str(number), pairs(4), model=model, precision=precision)
        again.train()
        fresh = trainer(tmp_path / f"{number} fresh", pairs(4), precision=precision)
        fresh.train()
        assert torch.equal(flat_weights(model), flat_weights(fresh.model)), precision
        assert again.evaluate(pairs(2, first=50)) == fresh.evaluate(pairs(2, first=50))


# ---- two ranks ----

# A row has one pair, so that ranks and the one process round the same numbers to bfloat16.
ROW = {"bits": 32, "precision": "bf16", "max_tokens_per_row": 1, "max_length": None}
RANKS: dict[str, dict[str, Any]] = {
    "plain": {"count": 16, **ROW},
    "accumulated": {"count": 16, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **ROW},
    "all_used": {"count": 16, "ddp_find_unused_parameters": False, **ROW},
    "checkpointing": {"count": 16, "activation_checkpointing": True, **ROW},
    "lora": {"count": 16, "lora": True, **ROW},
    "uneven": {"count": 18, **ROW},  # in the last step one rank has no pair
    "garbage": {"count": 16, "garbage": True, "loss_weights": {"nll": 1.0}, **ROW},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, two_processes(folder, dict(RANKS))


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_equal_one(tmp_path: Path, ranks: tuple[Path, dict[str, Any]], name: str) -> None:
    """Gradients are summed over ranks in float32: weights differ by its rounding, not by that of bfloat16."""
    folder, found = ranks
    run = {key: value for key, value in RANKS[name].items() if key != "garbage"}
    single, moved = in_one_process(tmp_path, run)
    assert "DistributedDataParallel" in found[name][0]["wrapper"]
    assert torch.equal(found[name][0]["weights"], found[name][1]["weights"])
    assert found[name][0]["weights"].dtype == torch.float32
    assert float((found[name][0]["weights"] - flat_weights(single.model)).norm()) < 1e-4 * moved
    if "loss_weights" not in run:
        first = logged(folder / name)[0]
        assert (first["rewards/chosen"], first["rewards/rejected"]) == (0.0, 0.0)
