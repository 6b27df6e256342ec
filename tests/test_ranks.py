"""Two processes are one: the same losses, delta and weights as a single one on the same pairs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.paths import REPO
from tests.training import flat_weights, logged, pairs, relative, trainer


def two_processes(folder: Path, **settings: object) -> list[dict]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.rank_worker", str(folder), json.dumps({**settings, "ddp_backend": "gloo"})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "src")])}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("reward_shift", ["previous", "running"])
def test_two_ranks_equal_one(tmp_path: Path, reward_shift: str) -> None:
    """Nine pairs, four a step: in the last step one rank has nothing to read; a third of the pairs have no image."""
    common = {"reward_shift": reward_shift, "learning_rate": 1e-2, "optim": "sgd", "num_train_epochs": 2}
    ranks = two_processes(tmp_path / "two", pairs=9, per_device_train_batch_size=2, **common)
    # In running mode a micro-batch over two ranks is one entry of delta: the single process reads all four at once.
    single = trainer(tmp_path / "one", pairs(9), dtype=torch.float64, per_device_train_batch_size=4, **common)
    single.train()
    assert ranks[0]["wrapped"]
    assert ranks[1]["wrapped"]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert ranks[0]["shift"] == ranks[1]["shift"]
    assert relative(ranks[0]["weights"], flat_weights(single.model)) < 1e-9
    expected = single.reward_shift.state_dict()
    assert ranks[0]["shift"]["count"] == expected["count"]
    assert ranks[0]["shift"]["sum"] == pytest.approx(expected["sum"], rel=1e-6)
    assert ranks[0]["accounts"] == single.all_accounts().to_json()
    timing = ("step_seconds", "pairs_per_second", "tokens_per_second", "data_wait_share")
    for mine, other in zip(logged(tmp_path / "two"), logged(tmp_path / "one"), strict=True):
        for key in other.keys() - set(timing):
            assert mine[key] == pytest.approx(other[key], rel=1e-6, abs=1e-9), key
