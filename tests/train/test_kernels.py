"""The fused kernels of a run: which it takes, what it says of them, and that policy and reference have the same."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.fused_standins import FUNCTIONS, wrong
from tests.tiny_models import model as tiny_model
from tests.training import config, flat_weights, logged, pairs, relative, trainer
from vlmpo.commands.config import evaluation_config, training_config
from vlmpo.errors import RecipeError
from vlmpo.models.kernels import is_bound
from vlmpo.recipe_yaml import dump_recipe, parse_recipe
from vlmpo.train import kernel_choice
from vlmpo.train.checkpoint import read_state
from vlmpo.train.config import MPOConfig
from vlmpo.train.kernel_choice import settle_liger


@pytest.fixture
def standins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU and liger-kernel; its functions run on the CPU."""
    monkeypatch.setattr(kernel_choice, "why_unusable", lambda device: None)
    monkeypatch.setattr(kernel_choice, "load_functions", lambda: FUNCTIONS)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines about kernels."""
    lines: list[str] = []
    monkeypatch.setattr(
        kernel_choice.logger, "info", lambda line: lines.append(line) if line.startswith("kernels: ") else None
    )
    return lines


def kinds_in(model: Any) -> set[str]:
    return {type(module).__name__ for module in model.modules() if is_bound(module)}


ALL = {"Qwen2RMSNorm", "Qwen2MLP", "InternVLVisionMLP", "Qwen2Attention"}


def test_one_line_says_what_is_used(tmp_path: Path, standins: None, said: list[str]) -> None:
    run = trainer(tmp_path, pairs(2))
    layers, tower = run.model.config.text_config.num_hidden_layers, run.model.config.vision_config.num_hidden_layers
    assert said == [
        f"kernels: stand-in 1 for {layers} gated MLPs and {tower} plain MLPs and {2 * layers + 1} RMS norms and "
        f"{layers} rotations"
    ]
    assert kinds_in(run.model) == kinds_in(run.reference.model) == ALL
    assert run.settings()["chosen.kernels"] == ["glu", "mlp", "rms_norm", "rotary"]
    assert run.settings()["model.kernels"] == "auto"


def test_on_a_cpu_there_are_none_and_nothing_is_said(tmp_path: Path, said: list[str]) -> None:
    run = trainer(tmp_path, pairs(2))
    assert said == []
    assert kinds_in(run.model) == set()
    assert run.kernels.key == ""
    assert run.settings()["chosen.kernels"] == []


def test_off_uses_none_and_takes_those_of_an_earlier_run_away(tmp_path: Path, standins: None, said: list[str]) -> None:
    model = tiny_model()
    trainer(tmp_path / "on", pairs(2), model=model)
    assert kinds_in(model) == ALL
    del said[:]
    trainer(tmp_path / "off", pairs(2), model=model, kernels="off")
    assert kinds_in(model) == set()
    assert said == []


def test_a_kernel_that_differs_is_left_out_and_said_so(
    tmp_path: Path, standins: None, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_choice, "load_functions", lambda: wrong("silu_mul", 0.1))
    run = trainer(tmp_path, pairs(2))
    assert kinds_in(run.model) == ALL - {"Qwen2MLP"}
    assert said[0].startswith("kernels: glu is left to the plain modules: Qwen2MLP of ")
    assert "in float32 is off by" in said[0]
    assert said[1].startswith("kernels: stand-in 1 for ")
    assert len(said) == 2


def test_what_one_rank_cannot_use_no_rank_uses(said: list[str]) -> None:
    on_ranks = [{"glu": None, "rms_norm": None}, {"glu": "no compiler", "rms_norm": None}]
    assert kernel_choice._agreed(on_ranks) == ["rms_norm"]
    assert said == ["kernels: glu is left to the plain modules: no compiler"]


def test_a_package_that_cannot_be_imported_ends_nothing(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(kernel_choice, "why_absent", lambda: None)
    monkeypatch.setattr(kernel_choice, "load_functions", broken)
    assert kernel_choice._functions_for(torch.device("cuda")) is None
    assert said == ["kernels: none: liger-kernel cannot be imported: RuntimeError: 0 active drivers"]
    del said[:]
    monkeypatch.setattr(kernel_choice, "why_absent", lambda: "liger-kernel is not installed")
    assert kernel_choice._functions_for(torch.device("cuda")) is None
    assert kernel_choice._functions_for(torch.device("cpu")) is None
    assert said == ["kernels: none: liger-kernel is not installed"]


# ---- transformers' own switch ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"use_liger_kernel": True},
            "use_liger_kernel: true, but fused kernels need a CUDA device, and the run is on cpu",
        ),
        ({"use_liger_kernel": True, "kernels": "off"}, "contradicts model.kernels: off"),
        ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config is not read"),
        ({"kernels": "on"}, "kernels must be one of auto, off, not 'on'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        config(tmp_path, **settings)
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernel_choice.why_unusable(torch.device("cuda")) == (
        "liger-kernel is not installed (pip install 'vlmpo[cuda]')"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else object())
    assert "triton is not installed" in str(kernel_choice.why_unusable(torch.device("cuda")))


@pytest.mark.slow
def test_use_liger_kernel_means_ours_and_transformers_patches_nothing(
    tmp_path: Path, standins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda *_: pytest.fail("transformers patched"))
    run = trainer(tmp_path, pairs(2), use_liger_kernel=True)
    assert run.args.use_liger_kernel is False
    assert run.settings()["model.kernels"] == "auto"
    run.train()
    assert kinds_in(run.model) == ALL
    assert run.shared
    args = config(tmp_path)
    args.use_liger_kernel = True  # later than __post_init__ looks
    settle_liger(args)
    assert args.use_liger_kernel is False


def test_it_may_be_set_after_the_settings_are_made(tmp_path: Path) -> None:
    from vlmpo.train.inputs import check_arguments

    args = config(tmp_path)
    args.use_liger_kernel = True
    with pytest.raises(RecipeError, match="MPOTrainer: use_liger_kernel: true, but fused kernels need a CUDA device"):
        check_arguments(args, None)


def test_a_recipe_for_a_gpu_is_refused_to_train_on_a_cpu_but_evaluates() -> None:
    recipe = parse_recipe(
        "model: {path: some/model}\ndata: {train: [pairs.jsonl]}\ntraining: {use_liger_kernel: true, use_cpu: true}"
    )
    with pytest.raises(RecipeError, match="training: use_liger_kernel: true, but fused kernels need a CUDA device"):
        training_config(recipe)
    assert evaluation_config(recipe).kernels == "auto"


def test_the_recipe_key() -> None:
    recipe = "model: {path: some/model, kernels: KERNELS}\ndata: {train: [pairs.jsonl]}"
    for text, expected in (("off", "off"), ("'off'", "off"), ("auto", "auto")):
        read = parse_recipe(recipe.replace("KERNELS", text))
        assert read.model.kernels == expected
        assert read.trainer_settings()["kernels"] == expected
        assert parse_recipe(dump_recipe(read)) == read
    for text in ("on", "liger", "1"):
        with pytest.raises(RecipeError, match=r"model.kernels: expected 'auto' or 'off'"):
            parse_recipe(recipe.replace("KERNELS", text))
    assert MPOConfig.__dataclass_fields__["kernels"].default == "auto"


# ---- policy and reference ----

REFERENCES: dict[str, dict[str, Any]] = {
    "copy": {},
    "given": {},
    "adapter": {},
    "cache": {"reference_kind": "cache"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewards_start_at_zero(tmp_path: Path, standins: None, kind: str, dtype: torch.dtype) -> None:
    settings = dict(REFERENCES[kind])
    if kind == "given":
        settings["ref_model"] = tiny_model(dtype=dtype)
    if kind == "adapter":
        settings["peft_config"] = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    if kind == "cache":
        settings["reference_cache_dir"] = str(tmp_path / "store")
    run = trainer(tmp_path / "run", pairs(4), dtype=dtype, **settings)
    reference = getattr(run.reference, "model", None)
    if kind in ("copy", "given"):
        assert kinds_in(reference) == ALL
    run.train()
    first = logged(tmp_path / "run")[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["loss/sigmoid"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.slow
def test_a_run_with_kernels_ends_where_the_plain_run_does(tmp_path: Path, standins: None) -> None:
    before = flat_weights(tiny_model())
    ends = []
    for kernels in ("auto", "off"):
        run = trainer(tmp_path / kernels, pairs(6), kernels=kernels, optim="sgd", learning_rate=0.1, max_grad_norm=1.0)
        run.train()
        ends.append(flat_weights(run.model) - before)
    assert float(ends[1].norm()) > 0.01
    assert relative(*ends) < 1e-4


@pytest.mark.slow
def test_a_store_keeps_log_probs_of_kernels_apart(tmp_path: Path, standins: None) -> None:
    def run(name: str, kernels: str) -> Any:
        settings = {"reference_kind": "cache", "reference_cache_dir": str(tmp_path / "store"), "kernels": kernels}
        made = trainer(tmp_path / name, pairs(3), **settings)
        made.train()
        return made

    assert run("plain", "off").reference.misses == 6
    assert run("fused", "auto").reference.misses == 6
    assert run("fused again", "auto").reference.hits == 6
    assert run("plain again", "off").reference.hits == 6


@pytest.mark.slow
def test_a_reference_that_is_loaded_again_has_the_same_kernels(tmp_path: Path, standins: None) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    model = type(tiny_model()).from_pretrained(tmp_path / "model")
    store = {"reference_kind": "cache", "reference_cache_dir": str(tmp_path / "store")}
    run = trainer(tmp_path / "run", pairs(3), model=model, **store)
    run.train()
    assert run.reference.model is None  # freed once its log-probs were all there
    assert kinds_in(run.reference.load().model) == ALL


# ---- resuming ----


@pytest.mark.slow
def test_a_resumed_run_uses_what_it_began_with(tmp_path: Path, standins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun where one kernel was left out, it goes on without it, to the bit, on a machine that has both."""
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    monkeypatch.setattr(kernel_choice, "load_functions", lambda: wrong("silu_mul", 0.1))
    whole = trainer(tmp_path / "whole", pairs(4), **settings)
    whole.train()
    chosen = read_state(tmp_path / "whole" / "checkpoint-1")["settings"]["chosen.kernels"]
    assert chosen == [
        "mlp",
        "rms_norm",
        "rotary",
    ]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-2")
    monkeypatch.setattr(kernel_choice, "load_functions", lambda: FUNCTIONS)
    resumed = trainer(tmp_path / "cut", pairs(4), **settings)
    assert kinds_in(resumed.model) == ALL
    resumed.train(resume_from_checkpoint=True)
    assert kinds_in(resumed.model) == kinds_in(resumed.reference.model) == ALL - {"Qwen2MLP"}
    assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))
    assert "chosen.kernels" not in resumed.checkpoints.history[-1]["changes"]


@pytest.mark.slow
def test_a_machine_without_them_goes_on_and_notes_it(
    tmp_path: Path, standins: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, pairs(4), **settings).train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    monkeypatch.undo()
    resumed = trainer(tmp_path, pairs(4), **settings)
    with caplog.at_level(logging.INFO):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.checkpoints.history[-1]["changes"]["chosen.kernels"] == [["glu", "mlp", "rms_norm", "rotary"], []]


@pytest.mark.slow
def test_whoever_asks_for_something_else_gets_it(tmp_path: Path, standins: None) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, pairs(4), kernels="off", **settings).train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    resumed = trainer(tmp_path, pairs(4), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert kinds_in(resumed.model) == ALL
    changes = resumed.checkpoints.history[-1]["changes"]
    assert changes["model.kernels"] == ["off", "auto"]
