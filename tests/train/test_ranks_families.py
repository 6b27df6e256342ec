"""Every family under FSDP2 on two ranks, of which one never has an image: the same weights as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import family_trainer
from tests.train.test_ranks import Ranks, two_processes
from tests.training import flat_weights
from tests.zoo import FAMILIES

# One of each shape of tower, positions, norms and experts; the others resemble one of them.
OF_A_KIND = (
    *("internvl-qwen2", "qwen2.5-vl", "qwen3-vl-moe", "qwen3.5", "llava-next", "llava-onevision", "idefics3"),
    *("pixtral", "gemma3", "gemma2-text", "mixtral-text", "cohere-text"),
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Ranks:
    here = [item for item in request.session.items if item.path == request.path]  # those that were chosen
    names = {item.callspec.params["name"] for item in here if isinstance(item, pytest.Function)}
    runs = {
        name: {"family": name, "fsdp": True, "per_device_train_batch_size": 2} for name in FAMILIES if name in names
    }
    return two_processes(tmp_path_factory.mktemp("families"), runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in OF_A_KIND else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
)
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
