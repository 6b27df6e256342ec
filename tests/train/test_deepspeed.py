"""DeepSpeed on the CPU, where it is installed: two processes against one, and the two files that ship.

DeepSpeed knows no float64, and its flat buffers do not tell a gradient that is none from one that is 0: so float32, and
SGD without momentum.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from tests.paths import REPO
from tests.train.test_ranks import ACCUMULATED, EVALUATED, events, in_one_process, two_processes
from tests.training import flat_weights, logged

FILES = {stage: REPO / "recipes" / "deepspeed" / f"zero{stage}.json" for stage in (2, 3)}
PLAIN = {"count": 18, "bits": 32, "optim_args": ""}
SAVED = {**PLAIN, "save_strategy": "steps", "save_steps": 2}
RUNS: dict[str, dict[str, Any]] = {
    "clipped": {**PLAIN, "max_grad_norm": 0.5},
    "accumulated": {**PLAIN, "count": 21, **ACCUMULATED, **EVALUATED, "attention": "separate"},
    "lora": {**PLAIN, "lora": True},
    "tied": {**PLAIN, "tied": True},
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.mark.parametrize("stage", FILES)
def test_the_files_parse(stage: int) -> None:
    config = HfDeepSpeedConfig(str(FILES[stage]))
    assert config.get_value("zero_optimization.stage") == stage
    assert config.is_zero3() == (stage == 3)
    for key in ("gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "bf16.enabled"):
        assert config.get_value(key) == "auto"  # as the recipe's training section has it


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def run(folder: Path, stage: int, name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One launch a run: after ZeRO-3 the process would build every further model in pieces."""
    return two_processes(folder, {name: {**settings, "deepspeed": str(FILES[stage])}})[name]


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", FILES)
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one(tmp_path: Path, on_cpu: None, stage: int, name: str) -> None:
    ranks = run(tmp_path, stage, name, RUNS[name])
    single, moved = in_one_process(tmp_path / "one", RUNS[name])
    assert "DeepSpeedEngine" in ranks[0]["wrapper"]
    assert single.reference is not None
    for rank in ranks:
        assert float((rank["weights"] - flat_weights(single.model)).norm()) < 1e-4 * moved
        assert rank["reference"] == single.reference.weights_hash()
        assert rank["shift"]["count"] == single.reward_shift.state_dict()["count"]
    for line, other in zip(events(tmp_path / name), events(tmp_path / "one"), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", FILES)
def test_resume(tmp_path: Path, on_cpu: None, stage: int) -> None:
    whole = run(tmp_path, stage, "whole", {**SAVED, "save": True})
    resumed = run(tmp_path, stage, "resumed", {**SAVED, "resume": ["whole", 2]})
    for one, other in zip(whole, resumed, strict=True):
        assert other["steps"] == one["steps"] - 2
        assert torch.equal(one["weights"], other["weights"])
        assert one["shift"] == other["shift"]
    from transformers import AutoModelForImageTextToText

    final = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole" / "final", dtype=torch.float32)
    assert torch.equal(flat_weights(final), whole[0]["weights"])


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", FILES)
def test_bf16_starts_from_the_reference(tmp_path: Path, on_cpu: None, stage: int) -> None:
    run(tmp_path, stage, "bf16", {**PLAIN, "bf16": True})
    first = logged(tmp_path / "bf16")[0]
    assert (first["rewards/chosen"], first["rewards/rejected"]) == (0.0, 0.0)
    assert json.loads(FILES[stage].read_text())["bf16"]["enabled"] == "auto"
