"""A tower that reads a few tiles at a time and computes them again: the same numbers, to rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.zoo import FAMILIES, Family, encoded_pairs
from vlmpo.train.batching import Collator
from vlmpo.tree import vision_blocks
from vlmpo.tree.forward import install
from vlmpo.tree.layout import PackedRow
from vlmpo.tree.vision_blocks import (
    _joined,
    _runs,
    can_read_in_blocks,
    read_in_blocks,
    trains_tower,
    vision_tower_of,
)

SEEING = [family for family in FAMILIES.values() if family.images]


def in_dtype(row: PackedRow, dtype: torch.dtype) -> PackedRow:
    for name, tensor in row.vision.items():
        row.vision[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return row


def read(model: Any, family: Family) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs and gradients of all of the family's sample pairs in as few rows as it allows."""
    batch = Collator(None, family.shared)(list(encoded_pairs(family.name).values()))
    rows = [in_dtype(row, model.dtype) for part in batch.micro_batches for row in part.rows]
    logps = model(packed_rows=rows)
    trained = list(model.parameters())
    gradients = torch.autograd.grad(logps.sum(), trained, allow_unused=True)
    return logps.detach(), [g for g in gradients if g is not None]


def count_reads(model: Any) -> list[int]:
    """Lists the patches or tiles of each call of the tower's own forward, recomputation included."""
    tower: Any = vision_tower_of(model)
    seen: list[int] = []
    layers = next(module for module in tower.modules() if isinstance(module, torch.nn.ModuleList))
    layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("family", SEEING, ids=lambda family: family.name)
def test_every_family_reads_in_blocks_what_it_reads_at_once(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_blocks, "BLOCK_TILES", 1)
    monkeypatch.setattr(vision_blocks, "BLOCK_PATCHES", 1)
    # torch's product for experts knows no float64.
    bound, dtype = (1e-5, torch.float32) if "moe" in family.name else (1e-12, torch.float64)
    model = family.model(0).to(dtype)
    install(model, family.shared)
    assert can_read_in_blocks(model)
    seen = count_reads(model)
    logps, gradients = read(model, family)
    whole = len(seen)
    read_in_blocks(model, on=True)
    seen.clear()
    in_blocks, again = read(model, family)
    assert len(seen) > 2 * whole  # some row in two blocks, and each block read twice
    assert (in_blocks - logps).abs().max() < 10 * bound
    difference = sum(float((a - b).square().sum()) for a, b in zip(again, gradients, strict=True))
    assert difference**0.5 < bound * sum(float(g.square().sum()) for g in gradients) ** 0.5
    read_in_blocks(model, on=False)
    seen.clear()
    assert torch.equal(read(model, family)[0], logps)
    assert len(seen) == whole


def test_a_frozen_copy_reads_the_same_blocks_bit_by_bit() -> None:
    family = FAMILIES["internvl-qwen2"]
    model = family.model(0)
    install(model, True)
    read_in_blocks(model, on=True)
    reference = copy.deepcopy(model).requires_grad_(False)
    tower: Any = vision_tower_of(reference)
    assert tower.forward.__self__ is tower
    assert vars(tower)["_vlmpo_plain_forward"].__self__ is tower
    rows = Collator(None, True)(list(encoded_pairs(family.name).values())).micro_batches[0].rows
    with torch.no_grad():
        expected = reference(packed_rows=rows)
    assert torch.equal(model(packed_rows=rows).detach(), expected)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.zero_()
    assert torch.equal(model(packed_rows=rows).detach(), expected)  # the copy reads its own weights


def test_a_frozen_tower_is_not_read_twice() -> None:
    family = FAMILIES["internvl-qwen2"]
    model = family.model(0)
    install(model, True)
    assert trains_tower(model)
    model.model.vision_tower.requires_grad_(False)
    assert not trains_tower(model)
    seen = count_reads(model)
    rows = Collator(None, True)(list(encoded_pairs(family.name).values())).micro_batches[0].rows
    read_in_blocks(model, on=True)
    model(packed_rows=rows).sum().backward()
    tiles = rows[0].vision["pixel_values"].shape[0]
    assert len(seen) == -(-tiles // vision_blocks.BLOCK_TILES)


def test_text_only_models_have_no_blocks() -> None:
    family = next(family for family in FAMILIES.values() if not family.images)
    assert not can_read_in_blocks(family.model(0))


def test_images_are_cut_into_runs() -> None:
    assert _runs([3, 4, 2, 9, 1, 1], 8) == [2, 1, 1, 2]
    assert _runs([], 8) == []


def test_outputs_are_joined_field_by_field() -> None:
    one, two = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    joined = _joined([{"a": one, "b": (one, two), "c": None}, {"a": two, "b": (two, one), "c": None}], 0)
    assert joined["a"].tolist() == [[1.0], [2.0]]
    assert joined["c"] is None
    assert [part.tolist() for part in joined["b"]] == [[[1.0], [2.0]], [[2.0], [1.0]]]
