"""Fused kernels under wrappers that gather weights around a module's forward: two ranks equal one plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_ranks import CLASS, in_one_process, two_processes
from tests.training import flat_weights, logged

pytestmark = pytest.mark.slow

# float32: of float64 the kernels take none
COMMON: dict[str, Any] = {"count": 12, "bits": 32, "standins": True}
RUNS: dict[str, dict[str, Any]] = {
    "ddp": COMMON,
    "fsdp": {**COMMON, "fsdp": True, "max_grad_norm": 0.5},
    "fsdp_checkpointing": {**COMMON, "fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
    "fsdp_lora": {**COMMON, "fsdp": True, "lora": True},
    "fsdp_one_loads": {**COMMON, "fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}, "garbage": True},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, two_processes(folder, RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_with_kernels_equal_one_without(tmp_path: Path, found: Any, name: str) -> None:
    folder, runs = found
    single, moved = in_one_process(tmp_path, RUNS[name])
    for rank in runs[name]:
        assert rank["bound"] == 10  # two gated MLPs and a plain one, five norms, two rotations
        assert CLASS[name.partition("_")[0]] in rank["wrapper"]
    weights = [rank["weights"] for rank in runs[name]]
    assert torch.equal(*weights)
    assert float((weights[0] - flat_weights(single.model)).norm()) < 1e-4 * moved
    mine, plain = logged(folder / name), logged(tmp_path)
    assert [line["loss"] for line in mine] == pytest.approx([line["loss"] for line in plain], rel=1e-5)
    assert mine[0]["rewards/chosen"] == 0.0
