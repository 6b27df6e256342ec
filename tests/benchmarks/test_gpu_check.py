"""benchmarks/gpu_check in miniature on a CPU: every part runs, its figures are right, and each fails alone."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu_model import (
    INTERNVL3_1B,
    INTERNVL3_8B,
    MINIATURE,
    forward_flops,
    make_model,
    make_pairs,
    make_processor,
    peak_flops,
)
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_arms, gpu_check
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.train.batching import lay_out
from vlmpo.tree import varlen
from vlmpo.tree.forward import install

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_parts_that_need_no_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "compiled_head", contextlib.nullcontext)  # a compiler is slow to start
    assert gpu_check.check(tmp_path, CPU, True, ["device", "alignment", "parity", "head"])
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert parts["device"]["torch"] == torch.__version__
    errors = parts["alignment"]["segments"]["errors"]
    assert len(errors) == 12  # two types, one to six responses
    assert 1e-5 < max(errors.values()) < 0.01  # rounding shows, and no more
    assert "error" in parts["alignment"]["torch"]  # there is no such kernel on a CPU, and that is said
    for family in ("internvl-qwen2", "qwen2.5-vl"):
        assert 0 < parts["parity"][family]["float32"]["gradient"] < 1e-5
        assert 1e-4 < parts["parity"][family]["bfloat16"]["gradient"] < 0.2
    (head,) = (found for name, found in parts["head"].items() if name != "seconds")
    assert set(head["eager"]) == set(head["compiled"])


@pytest.mark.slow
def test_the_first_step_in_bf16(tmp_path: Path) -> None:
    assert gpu_check.check(tmp_path, CPU, True, ["start"])


@pytest.mark.slow
def test_a_wrong_kernel_fails_the_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Any, scale: Any) -> torch.Tensor:
        return query + 0 * key.sum() + 0 * value.sum()

    monkeypatch.setattr(varlen, "CANDIDATES", {"blind": lambda: blind})
    found = gpu_check.part_alignment(gpu_check.Run(CPU, True, time.perf_counter() + 60))
    assert not found["passed"]
    assert found["blind"]["worst"] > 0.5
    assert found["segments"]["worst"] < 0.01


def test_a_part_that_fails_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: gpu_check.Run) -> dict[str, Any]:
        raise RuntimeError("no luck")

    given: list[float] = []

    def device(run: gpu_check.Run) -> dict[str, Any]:
        given.append(run.left())
        return gpu_check.part_device(run)

    parts = {"bad": (10, fails), "device": (5, device), "late": (5, fails)}
    monkeypatch.setattr(gpu_check, "parts", lambda miniature: parts)
    assert not gpu_check.check(tmp_path, CPU, True, ["bad", "device"])
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert not record["passed"]
    assert "no luck" in record["parts"]["bad"]["error"]
    assert record["parts"]["device"]["torch"] == torch.__version__
    assert given == pytest.approx([150.0], abs=1.0)  # of 450 seconds for the two that were asked for, a third
    monkeypatch.setattr(gpu_check, "ALL_SECONDS", 0.0)
    gpu_check.check(tmp_path, CPU, True, ["late"])
    assert "no time" in json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["late"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "optimizer"), [(torch.float32, "adamw"), (torch.bfloat16, "sgd")])
def test_every_arm_runs_and_starts_at_the_same_loss(dtype: torch.dtype, optimizer: str) -> None:
    """In float32 those that compute the same agree to 1e-5; TRL scores the line break behind a turn too."""
    setting = gpu_arms.Setting(MINIATURE, dtype, optimizer, 2, False, CPU, steps=1, seconds=120)
    found = {name: gpu_arms.measure(name, setting) for name in gpu_arms.arms() if "floor" not in name}
    assert {"vlmpo, online", "TRL", "two padded rows"} <= set(found)
    assert not [arm["error"] for arm in found.values() if "error" in arm]
    losses = {name: arm["first_logs"]["loss"] for name, arm in found.items() if "grouped" not in name}
    exact = 1e-5 if dtype == torch.float32 else 2e-3
    for name, loss in losses.items():
        assert loss == pytest.approx(losses["two padded rows"], rel=1e-3 if name == "TRL" else exact)
    for name, arm in found.items():
        assert arm["first_logs"].get("shared_rows", 1.0) == 1.0
        assert ("shared_rows" in arm["first_logs"]) == name.startswith("vlmpo")
        assert arm["steps"] == 1
        assert arm["seconds"] > 0


@pytest.mark.slow
def test_the_floor_runs_under_checkpointing_and_the_clock_ends_an_arm() -> None:
    setting = gpu_arms.Setting(MINIATURE, torch.float32, "adamw", 1, True, CPU, steps=10**6, seconds=0.0)
    found = gpu_arms.measure("floor", setting)
    assert found["steps"] == 1  # the first that could be timed
    assert found["first_logs"]["loss"] == pytest.approx(math.log(1000), rel=0.01)  # random weights
    setting.seconds = 10.0
    assert all("no time" in arm["error"] for _, arm in gpu_arms.table(setting, lambda: 1.0))


def test_an_arm_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(gpu_arms, "arms", lambda: {"a": full, "b": lambda *_: 1 // 0})
    setting = gpu_arms.Setting(MINIATURE, torch.float32, "adamw", 1, False, CPU)
    assert gpu_arms.measure("a", setting)["error"] == "out of memory"
    assert "ZeroDivisionError" in gpu_arms.measure("b", setting)["error"]


def test_operations_are_those_that_torch_counts() -> None:
    """All but attention's, which torch's counter leaves out on a CPU; attention is worked out by hand below."""
    processor = make_processor(MINIATURE)
    model = make_model(MINIATURE, processor, torch.float32, CPU)
    install(model, shared=True)
    encoder = PairEncoder(processor)
    pairs = [encoder.encode(pair) for pair in make_pairs(MINIATURE, 2)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(packed_rows=lay_out(pairs, True).rows)
    counted = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    sizes = [(p.prompt_ids.numel(), [p.chosen_ids.numel(), p.rejected_ids.numel()]) for p in pairs]
    assert counted == sum(forward_flops(MINIATURE, *size).products for size in sizes)


def test_attention_operations_by_hand() -> None:
    """Prompt 2 and responses of 1 and 2: 3 + 3 + (4 + 3) = 13 pairs see each other, 2 layers of width 32."""
    vision = 4 * 2 * 3 * (4 * 4 + 1) ** 2 * 32
    assert forward_flops(MINIATURE, 2, [1, 2]).attention == vision + 4 * 2 * 13 * 32


def test_the_sizes_are_internvl3s() -> None:
    processor = make_processor(MINIATURE)
    for size, billions in ((INTERNVL3_1B, 0.938), (INTERNVL3_8B, 7.944)):
        model = make_model(size, processor, torch.bfloat16, torch.device("meta"))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") is None
