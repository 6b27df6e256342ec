"""``training.deterministic``: what is set and restored, what is refused, and that runs with one seed are equal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.backends import cudnn

from tests.commands.test_train import call, checkpoint, records, write_data, write_recipe  # noqa: F401
from tests.training import AfterSteps, config, flat_weights, logged, pairs, trainer
from vlmpo import MPOTrainer
from vlmpo.errors import RunError
from vlmpo.train.determinism import WORKSPACE, deterministic_run, prepare_determinism

FLASH = "FLASH_ATTENTION_DETERMINISTIC"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, "")  # as good as unset, and restored
    monkeypatch.delenv(FLASH, raising=False)


def switches() -> list[Any]:
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        cudnn.benchmark,
        os.environ.get(FLASH),
    ]


def no_deterministic_way() -> None:
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


# ---- before CUDA is used ----


def test_the_workspace_is_set_if_nothing_is() -> None:
    prepare_determinism(False, full_determinism=False)
    assert os.environ[WORKSPACE] == ""
    prepare_determinism(True, full_determinism=False)
    assert os.environ[WORKSPACE] == ":4096:8"


def test_a_workspace_that_serves_is_kept_though_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setenv(WORKSPACE, ":16:8")
    prepare_determinism(True, full_determinism=False)
    assert os.environ[WORKSPACE] == ":16:8"


def test_what_is_too_late_or_set_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, and it is ':0:0'; unset it"):
        config(tmp_path, deterministic=True)
    config(tmp_path)  # others may set what they like
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="before CUDA is first used, and this process has used it already; set CUBLAS"):
        config(tmp_path, deterministic=True)
    assert os.environ[WORKSPACE] == ""


def test_full_determinism_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"CUDA_LAUNCH_BLOCKING=1.*leave full_determinism out"):
        config(tmp_path, deterministic=True, full_determinism=True)
    config(tmp_path, full_determinism=True)
    assert "training.deterministic: true is equal to the bit without that" in capsys.readouterr().err
    config(tmp_path, deterministic=True)
    assert capsys.readouterr().err == ""


def test_only_true_and_false_will_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="deterministic must be true or false, not 'auto'"):
        config(tmp_path, deterministic="auto")


# ---- the switch ----


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_all_is_as_it_was_before(before: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        was = switches()
        with deterministic_run(False):
            assert switches() == was
        with deterministic_run(True):
            assert switches() == [True, False, False, False, "1"]
            with deterministic_run(True):  # an evaluation while training
                pass
            assert switches() == [True, False, False, False, "1"]
        assert switches() == was
        with pytest.raises(KeyError), deterministic_run(True):
            raise KeyError
        assert switches() == was
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_refused_operation_is_named() -> None:
    with deterministic_run(False):
        no_deterministic_way()
    named = r"training\.deterministic: put_ has no deterministic implementation in torch"
    with pytest.raises(RunError, match=named), deterministic_run(True):
        no_deterministic_way()
    assert not torch.are_deterministic_algorithms_enabled()
    cublas = "Deterministic behavior was enabled, but this operation is not deterministic because it uses CuBLAS and"
    with pytest.raises(RunError, match="a product by cuBLAS under CUBLAS_WORKSPACE_CONFIG="), deterministic_run(True):
        raise RuntimeError(cublas)
    with pytest.raises(RuntimeError, match=r"^out of memory$"), deterministic_run(True):
        raise RuntimeError("out of memory")


def test_flash_attn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package has no switch of its own: it takes an argument, read when a row is attended to."""
    from types import SimpleNamespace

    from vlmpo.tree import varlen

    told = []
    fake = SimpleNamespace(flash_attn_varlen_func=lambda *args, **named: told.append(named["deterministic"]) or args[0])
    monkeypatch.setattr(varlen.importlib, "import_module", lambda name: fake)
    kernel = varlen.CANDIDATES["flash-attn"]()
    states = torch.zeros(5, 1, 8)
    segments = varlen.RowLayout((varlen.TreeSpan(0, 2, (3,)),)).segments(torch.device("cpu"))
    kernel(states, states, states, segments, None)
    with deterministic_run(True):
        kernel(states, states, states, segments, None)
    assert told == [False, True]


# ---- runs ----


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"bf16": True, "group_by_prompt": 2}, {"attention": "separate"}])
def test_two_runs_with_one_seed_are_equal_to_the_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    weights, lines = [], []
    for name in ("first", "second"):
        on = []
        watch = AfterSteps(lambda step, on=on: on.append(torch.are_deterministic_algorithms_enabled()))
        run = trainer(tmp_path / name, pairs(6), deterministic=True, callbacks=[watch], **settings)
        run.train()
        assert on == [True, True, True]
        assert not torch.are_deterministic_algorithms_enabled()
        weights.append(flat_weights(run.model))
        times = {"step_seconds", "pairs_per_second", "tokens_per_second", "data_wait_share", "memory_gib"}
        lines.append([{k: v for k, v in line.items() if k not in times} for line in logged(tmp_path / name)])
    assert torch.equal(*weights)
    assert lines[0] == lines[1]
    plain = trainer(tmp_path / "plain", pairs(6), **settings)
    plain.train()
    assert torch.equal(flat_weights(plain.model), weights[0])  # on one CPU thread the switch changes nothing


@pytest.mark.slow
def test_evaluating_and_filling_the_store_are_deterministic_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = []
    plain = MPOTrainer._prepare_inputs
    monkeypatch.setattr(
        MPOTrainer, "_prepare_inputs", lambda *a: on.append(torch.are_deterministic_algorithms_enabled()) or plain(*a)
    )
    store = {"reference_kind": "cache", "reference_cache_dir": str(tmp_path / "store")}
    run = trainer(tmp_path, pairs(2), deterministic=True, eval_dataset=pairs(2, first=4), **store)
    run.evaluate()
    run.precompute_reference()
    assert on
    assert all(on)


@pytest.mark.slow
def test_the_command_ends_with_one_line_that_names_the_operation(
    tmp_path: Path,
    checkpoint: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_data(tmp_path, records(4))
    recipe = write_recipe(tmp_path, checkpoint, training={"deterministic": True, "max_steps": 1})
    assert call("train", recipe).exit_code == 0
    step = MPOTrainer.training_step
    monkeypatch.setattr(MPOTrainer, "training_step", lambda *a, **k: no_deterministic_way() or step(*a, **k))
    output = call("train", recipe, f"training.output_dir={tmp_path / 'other'}")
    assert output.exit_code == 2
    assert "training.deterministic: put_ has no deterministic implementation" in output.stderr
    assert "Traceback" not in output.stderr
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(WORKSPACE, ":0:0")
    output = call("train", recipe, f"training.output_dir={tmp_path / 'third'}")
    assert output.exit_code == 2
    assert "training: deterministic needs the environment variable CUBLAS_WORKSPACE_CONFIG" in output.stderr
    assert call("train", recipe, "training.deterministic=maybe").exit_code == 2
