"""Attention by products is SDPA's: outputs and gradients as near to float64 as SDPA's own in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tests.tiny_models import model as tiny_model
from vlmpo.tree import forward, products
from vlmpo.tree.products import TOWER_ATTENTION, attend_by_products, can_attend


def with_gradients(attend: Callable[..., Tensor], states: list[Tensor]) -> list[Tensor]:
    *inputs, grad = states
    inputs = [state.detach().requires_grad_() for state in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def states(heads: int, kv_heads: int, queries: int, keys: int, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads * 1000 + queries)
    shapes = [(batch, count, tokens, 32) for count, tokens in ((heads, queries), (kv_heads, keys), (kv_heads, keys))]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in (*shapes, shapes[0])]


def distance(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(4, 4, 70, 70, 3), (8, 2, 90, 90, 1), (8, 4, 20, 110, 1), (6, 2, 1, 40, 1)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scores", [2**20, 1])  # all heads at a time, and one
@pytest.mark.parametrize("kept", [0, 100])  # probabilities made again, and kept
def test_it_is_as_exact_as_sdpa(
    shape: tuple[int, ...], masked: bool, scores: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_SCORES", scores)
    monkeypatch.setattr(products, "_KEPT", kept)
    given = states(*shape)
    _, _, queries, keys, _ = shape
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if masked else None
    hidden = None if mask is None else torch.zeros(queries, keys).masked_fill(~mask, float("-inf"))

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)

    exact = with_gradients(sdpa, [state.double() for state in given])
    theirs = with_gradients(sdpa, given)
    ours = with_gradients(lambda query, key, value: attend_by_products(query, key, value, hidden, 0.3), given)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.shape == true.shape
        assert distance(mine, true) < max(2 * distance(other, true), 5e-3)


def test_where_it_is_used() -> None:
    query, key, _, _ = states(4, 2, 600, 600)
    assert can_attend(query, key, masked=True)
    assert not can_attend(query.float(), key.float(), masked=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # its products would round the scores
        assert not can_attend(query, key, masked=True)
    query, key, _, _ = states(1, 1, 1500, 1500)
    assert can_attend(query, key, masked=False)
    assert not can_attend(query, key, masked=True)  # SDPA leaves out the half that is hidden


def test_the_tower_has_it_while_rows_are_read() -> None:
    model = tiny_model()
    tower = model.config.vision_config
    assert tower._attn_implementation == "sdpa"
    with forward.installed(model, True):
        assert tower._attn_implementation == TOWER_ATTENTION
        assert TOWER_ATTENTION in AttentionInterface().valid_keys()
    assert tower._attn_implementation == "sdpa"
