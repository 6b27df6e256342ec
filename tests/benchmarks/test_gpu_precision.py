"""The ways to compute in bf16, in miniature on a CPU: all of them run, and start from the same number."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_precision


@pytest.mark.long
def test_every_way_is_measured() -> None:
    run = SimpleNamespace(device=torch.device("cpu"), miniature=True, left=lambda: math.inf)
    figures = gpu_precision.part_precision(run)
    for count in (1, 2):
        ways = figures[f"{count} pairs"]
        assert set(ways) == {*gpu_precision.WAYS, "masters to FSDP2"}
        ours = ways["masters"]
        assert ours["seconds"] == pytest.approx(ours["forward_backward"] + ours["optimizer"], rel=0.5)
        assert ways["masters to FSDP2"] == ours["seconds"] / ways["FSDP2"]["seconds"]
        assert ways["autocast"]["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-3)
    assert len({figures["1 pairs"][way]["first_loss"] for way in ("bf16 weights", "masters", "FSDP2")}) == 1
    assert not torch.distributed.is_initialized()


def test_without_time_it_says_so() -> None:
    run = SimpleNamespace(device=torch.device("cpu"), miniature=True, left=lambda: 0.0)
    figures = gpu_precision.part_precision(run)
    assert figures["error"].startswith("left out for want of time")
