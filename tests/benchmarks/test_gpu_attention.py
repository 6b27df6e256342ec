"""benchmarks/gpu_attention in miniature on a CPU: what it measures is right, and what cannot run says why."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_alignment, gpu_attention
from vlmpo.tree.layout import RowLayout, TreeSpan
from vlmpo.tree.varlen import attend_densely, visible

CPU = torch.device("cpu")
ROW = RowLayout((TreeSpan(0, 3, (2, 1, 4)), TreeSpan(10, 2, (1,))))


def test_flex_attention_is_asked_for_what_a_row_sees() -> None:
    sees = gpu_attention.sees(ROW, CPU)
    at = torch.arange(ROW.num_tokens)
    none = torch.tensor(0)
    assert torch.equal(sees(none, none, at[:, None], at[None]), visible(ROW))


def test_flex_attention_reads_a_row() -> None:
    states = gpu_alignment.random_states(ROW, 4, 2, 16, CPU)[:3]
    with torch.no_grad():  # it has no backward pass on a CPU
        got = gpu_attention.flex_reader()(states, ROW)
    torch.testing.assert_close(got, attend_densely(*states, ROW), atol=1e-5, rtol=0)


def test_shapes_are_those_of_a_row() -> None:
    assert [shape.layout(False).num_tokens for shape in gpu_attention.SHAPES] == 2 * [2 * 2282, 1832 + 2250]


def test_only_a_right_candidate_is_the_fastest() -> None:
    found = {
        "wrong": {"error_norm": 0.5, "ms": 1.0},
        "slow": {"error_norm": 0.004, "ms": 3.0},
        "right": {"error_norm": 0.005, "ms": 2.0},
        "absent": {"error": "no such module"},
    }
    assert gpu_attention.fastest_right(found) == "right"
    assert gpu_attention.fastest_right({"wrong": found["wrong"]}) is None


@pytest.mark.slow
def test_the_part_in_miniature() -> None:
    run = SimpleNamespace(device=CPU, miniature=True, left=lambda: 100.0)
    part = gpu_alignment.part_attention(run)
    json.dumps(part)
    assert set(part["fastest"].values()) <= {"segments", "segments, cuDNN"}  # which are the same on a CPU
    for found in part["shapes"].values():
        assert 1e-4 < found["segments"]["error_norm"] < 0.01  # rounding shows, and no more
        assert "_flash_attention_forward" in found["torch"]["error"]
        assert "backward on CPU" in found["flex"]["error"]
        assert len(found) == 8
    assert part["table"].count("\n") == 1 + 4 * 8


def test_without_time_candidates_are_left_out() -> None:
    run = SimpleNamespace(device=CPU, miniature=True, left=lambda: 1.0)
    part = gpu_alignment.part_attention(run)
    assert {one["error"] for found in part["shapes"].values() for one in found.values()} == {
        "left out: no time was left"
    }
    assert set(part["fastest"].values()) == {None}
