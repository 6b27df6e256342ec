"""benchmarks/gpu_kernels in miniature on a CPU, with stand-ins for the kernels."""

from __future__ import annotations

import time

import pytest
import torch
from benchmarks.gpu_check import Run
from benchmarks.gpu_kernels import STAGES

from benchmarks import gpu_kernels
from tests.fused_standins import wrong

CPU = torch.device("cpu")


def run(seconds: float = 100.0) -> Run:
    return Run(CPU, True, time.perf_counter() + seconds)


def test_every_kind_is_measured_and_the_model_reads_the_same() -> None:
    found = gpu_kernels.part_kernels(run())
    assert found["passed"]
    assert {name.partition(":")[0] for name in found["kinds"]} == {"rms_norm", "glu", "mlp", "layer_norm", "rotary"}
    for figures in found["kinds"].values():
        assert figures["fault"] is None
        for way in ("plain", "kernel", "torch"):
            if way in figures:
                assert 1e-4 < figures[way]["error"] < 0.01  # bf16's rounding shows, and no more
                assert figures[way]["microseconds"] > 0
        assert figures["times_faster"] == figures["plain"]["microseconds"] / figures["kernel"]["microseconds"]
    stages = found["model"]
    assert list(stages) == list(STAGES)
    assert stages["plain"]["modules"] == {}
    # Two layers in either tower: two norms each and one behind the last, or in front of the projector.
    assert stages["+ rotary"]["modules"] == {"rms_norm": 5, "glu": 2, "mlp": 2, "layer_norm": 5, "rotary": 2}
    assert all(stage["difference"] < 0.1 for stage in stages.values())
    assert stages["plain"]["milliseconds"] * (1 - sum(stage["gain"] for stage in stages.values())) == pytest.approx(
        stages["+ rotary"]["milliseconds"]
    )


def test_a_kernel_that_is_wrong_fails_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "functions_for", lambda device: wrong("gelu_mul", 0.5))
    found = gpu_kernels.part_kernels(run(seconds=0.0))
    assert not found["passed"]
    faults = [name for name, figures in found["kinds"].items() if figures["fault"]]
    assert faults == ["glu: Gemma 3 (128), 30 rows"]
    assert all(stage["milliseconds"] == [] for stage in found["model"].values())  # no time was left
