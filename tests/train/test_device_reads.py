"""A step waits for the device once, when the gradient's norm is read: how often a number is read, and from where."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny_models import image_tree, model, noise_image
from tests.training import config, pairs, trainer
from tests.zoo import FAMILIES, sample_pairs
from vlmpo import MPOTrainer
from vlmpo.train.batching import lay_out
from vlmpo.tree import placeholders
from vlmpo.tree.forward import install
from vlmpo.tree.layout import build_row

# What reads a number on the host, or makes a tensor whose size depends on numbers: on CUDA each waits for the device.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique_consecutive"}
ON_THE_HOST = ("tree/placeholders.py", "tree/positions.py:_three_dimensional")  # of tensors that are on the CPU


class DeviceReads(TorchDispatchMode):
    """Counts reads by the innermost function that is not torch's, while ``on``."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.on and operator._schema.name in READS:
            frames = [f"{frame.filename}:{frame.name}" for frame in traceback.extract_stack()]
            if not any(place in frame for frame in frames for place in ON_THE_HOST):
                ours = [frame for frame in frames[:-1] if "/torch/" not in frame]
                self.found[ours[-1].split("/")[-1]] += 1
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> DeviceReads:
    """Counts from the second optimizer step on, without the fetching of data."""
    mode, fetch, fetched = DeviceReads(), MPOTrainer.get_batch_samples, []

    def get_batch_samples(self: Any, *arguments: Any) -> Any:
        mode.on = False
        batches = fetch(self, *arguments)
        fetched.append(batches)
        mode.on = len(fetched) > 1
        return batches

    monkeypatch.setattr(MPOTrainer, "get_batch_samples", get_batch_samples)
    return mode


@pytest.mark.slow
def test_a_step_reads_the_norm_and_nothing_before_it(reads: DeviceReads, tmp_path: Path) -> None:
    """Two rows a step, two micro-batches of accumulation, five steps counted."""
    run = trainer(
        tmp_path,
        pairs(24),
        max_steps=6,
        logging_steps=100,
        max_tokens_per_row=60,
        gradient_accumulation_steps=2,
        callbacks=[],
    )
    with reads:
        run.train()
    assert reads.found.pop("trainer.py:_get_grad_norm") == 5
    # At the end of training transformers reads the loss, and vlmpo the sums behind the log.
    assert sum(reads.found.values()) <= 2
    assert not [name for name in reads.found if name.startswith(("metrics.py", "delta.py", "modeling_"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl-qwen2", "gemma3", "llava-1.5"])
def test_no_family_waits_in_its_forward(name: str, reads: DeviceReads, tmp_path: Path) -> None:
    family = FAMILIES[name]
    args = config(tmp_path, max_steps=3, logging_steps=100)
    data = 6 * [sample_pairs(family)["one image"]]
    run = MPOTrainer(model=family.model(0), args=args, train_dataset=data, processing_class=family.processor())
    with reads:
        run.train()
    assert reads.found.pop("trainer.py:_get_grad_norm") == 2
    assert sum(reads.found.values()) <= 2
    assert not [read for read in reads.found if read.startswith(("modeling_", "masking_utils", "layout.py"))]


def test_image_tokens_are_found_in_the_ids_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moved row is read as one that was not, and the model's own check still refuses a wrong number of tokens."""
    row = build_row([image_tree([noise_image(60, 60, 1)], [4, 3], 1)])
    ours = model()
    install(ours, shared=True)
    given: list[Tensor] = []
    find = ours.base_model.get_placeholder_mask

    def watched(input_ids: Tensor, inputs_embeds: Tensor, **features: Any) -> Tensor:
        given.append(input_ids)
        return find(input_ids, inputs_embeds=inputs_embeds, **features)

    monkeypatch.setattr(type(ours.base_model), "get_placeholder_mask", lambda self, *a, **k: watched(*a, **k))
    with torch.no_grad():
        plain = ours(packed_rows=[row])
        moved = row.to(torch.device("cpu"))
        assert moved.to(torch.device("cpu")).host_ids is row.input_ids
        again = ours(packed_rows=[moved])
    assert torch.equal(plain, again)
    assert given[1] is row.input_ids
    assert "get_placeholder_mask" not in vars(ours.base_model)
    broken = lay_out([]).rows or [row.to(torch.device("cpu"))]
    broken[0].vision["pixel_values"] = broken[0].vision["pixel_values"][:1].repeat(3, 1, 1, 1)
    with pytest.raises(ValueError, match="do not match"):
        ours(packed_rows=broken)
    assert placeholders._FINDER not in vars(ours.base_model)
