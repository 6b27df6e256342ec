"""The part of benchmarks/gpu_check that looks at memory, in miniature on a CPU."""

from __future__ import annotations

import pytest
import torch
from benchmarks.gpu_memory import Alone, part_memory


@pytest.mark.long
def test_memory_in_miniature() -> None:
    figures = part_memory(Alone(torch.device("cpu"), miniature=True))
    assert figures["passed"]
    assert len(figures["shapes"]) == 3
    assert all(0.7 < shape["predicted"] < 1.3 for shape in figures["shapes"].values())
    full = figures["out of memory"]
    assert full["halved"] >= 1
    assert full["pairs"] == 24
    assert full["rewards"] == [0.0, 0.0]
    assert full["most_tokens"] <= 1000
