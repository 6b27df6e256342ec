"""Every family under FSDP2 on two ranks, of which one never has an image: the same weights as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import family_trainer
from tests.train.test_ranks import Ranks, two_processes
from tests.training import flat_weights
from tests.zoo import FAMILIES


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    runs = {name: {"family": name, "fsdp": True, "per_device_train_batch_size": 2} for name in FAMILIES}
    return two_processes(tmp_path_factory.mktemp("families"), runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_equal_one(tmp_path: Path, ranks: Ranks, name: str) -> None:
    single = family_trainer(tmp_path, name, per_device_train_batch_size=4)
    before = flat_weights(single.model).clone()
    single.train()
    after = flat_weights(single.model)
    moved = float((after - before).norm())
    for rank in ranks[name]:
        assert "FSDPModule" in rank["wrapper"]
        assert rank["steps"] == 2
        # Gemma, Cohere and Qwen3.5 compute some of a float64 model in float32, mixtures of experts all.
        assert float((rank["weights"] - after).norm()) < 1e-5 * moved
    assert torch.equal(ranks[name][0]["weights"], ranks[name][1]["weights"])
