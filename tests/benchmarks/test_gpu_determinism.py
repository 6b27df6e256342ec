"""benchmarks/gpu_determinism in miniature on a CPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_determinism

CPU = torch.device("cpu")


@pytest.mark.long
def test_the_part_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")  # of this process: the other has its own
    found = gpu_determinism.part_determinism(gpu_check.Run(CPU, True, time.perf_counter() + 120))
    assert found["passed"], found
    for name in ("deterministic", "plain"):
        assert found[name]["weights that differ"] == 0
        assert found[name]["weights"] > 10_000
        assert found[name]["first rewards"][0]["log-prob"] < 0
    assert found["cost of deterministic"] == found["deterministic"]["seconds"] / found["plain"]["seconds"]


def test_a_sum_that_depends_on_its_row_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_determinism.differing_sums(CPU, 20) == 1

    def in_float32(values: torch.Tensor, rows: list) -> torch.Tensor:
        index = torch.cat([row.response_index for row in rows])
        sums = torch.zeros(rows[0].num_responses).index_add(0, index, values.flip(0) if len(values) % 2 else values)
        return sums.double()

    monkeypatch.setattr(gpu_determinism, "sum_by_response", in_float32)
    assert gpu_determinism.differing_sums(CPU, 20) > 1


@pytest.mark.slow
def test_a_process_that_fails_is_a_part_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no memory >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(gpu_determinism.sys, "executable", str(broken))
    found = gpu_determinism.part_determinism(gpu_check.Run(CPU, True, time.perf_counter() + 60))
    assert found == {"error": "no memory\n", "passed": False}
