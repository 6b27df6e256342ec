"""What is computed again in the backward pass: gradients are the same bits, and what was to be saved is saved."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from tests.zoo import FAMILIES, Family, encoded_pairs
from vlmpo.train.batching import lay_out
from vlmpo.tree import recompute
from vlmpo.tree.forward import install, score_rows
from vlmpo.tree.recompute import keep_all, prepare, recomputing

HIDDEN, INNER, TOKENS = 8, 24, 5


class Kept:
    """Counts recipes kept in the place of tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.again: list[int] = []
        plain = recompute._Recipe.again

        def counted(recipe: Any, shape: torch.Size) -> Tensor:
            result = plain(recipe, shape)
            self.again.append(result.numel())
            return result

        monkeypatch.setattr(recompute._Recipe, "again", counted)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(monkeypatch)


def gated() -> Qwen2MLP:
    torch.manual_seed(0)
    return Qwen2MLP(Qwen2Config(hidden_size=HIDDEN, intermediate_size=INNER))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    with recomputing(model):
        y = model(x)
    return list(torch.autograd.grad(y.square().sum(), list(model.parameters())))


def assert_prepared_alike(block: nn.Module, x: Tensor) -> None:
    """Preparing ``block`` changes no bit of its gradients."""
    plain = gradients(block, x)
    prepare(block)
    for one, other in zip(gradients(block, x), plain, strict=True):
        assert torch.equal(one, other)


# ---- every family ----


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_gradients_of_every_family_are_what_they_were_bit_by_bit(family: Family, kept: Kept) -> None:
    model = family.model(0)
    install(model, family.shared)
    trained = list(model.parameters())

    def read(rows: Any) -> tuple[Tensor, tuple[Any, ...]]:
        logps = score_rows(model, rows, family.shared)
        return logps.detach(), torch.autograd.grad(logps.sum(), trained, allow_unused=True)

    for encoded in encoded_pairs(family.name).values():
        rows = lay_out([encoded], family.shared).rows
        model._vlmpo_keeps_all = False
        logps, mine = read(rows)
        again = len(kept.again)
        assert again > 0
        keep_all(model)
        plain, theirs = read(rows)
        assert len(kept.again) == again
        assert torch.equal(logps, plain)
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        kept.again.clear()


# ---- one block ----


def test_a_gated_block_keeps_two_of_its_four_inner_tensors(kept: Kept) -> None:
    block = gated()
    x = torch.randn(1, TOKENS, HIDDEN)
    plain = gradients(block, x)
    prepare(block)
    mine = gradients(block, x)
    # Both the product (for W_down's gradient) and the activated gate (for the other factor's) are computed again.
    assert kept.again == [TOKENS * INNER] * 2
    for one, other in zip(mine, plain, strict=True):
        assert torch.equal(one, other)


def test_an_ungated_block_keeps_one_of_two(kept: Kept) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))
    x = torch.randn(TOKENS, HIDDEN)
    assert_prepared_alike(block, x)
    assert kept.again == [TOKENS * INNER]


@pytest.mark.parametrize("lean", [False, True])
def test_what_is_computed_again_is_not_held_between_the_passes(lean: bool) -> None:
    block = gated()
    prepare(block)
    if not lean:
        keep_all(block)
    inner: dict[str, StorageWeakRef] = {}

    def watch(name: str, tensor: Tensor) -> None:
        assert tensor.numel() == TOKENS * INNER
        inner[name] = StorageWeakRef(tensor.untyped_storage())

    block.gate_proj.register_forward_hook(lambda module, args, output: watch("gate", output))
    block.up_proj.register_forward_hook(lambda module, args, output: watch("up", output))
    block.act_fn.register_forward_hook(lambda module, args, output: watch("activated", output))
    block.down_proj.register_forward_pre_hook(lambda module, args: watch("product", args[0]))
    with recomputing(block):
        y = block(torch.randn(1, TOKENS, HIDDEN))
    held = {name for name, storage in inner.items() if not storage.expired()}
    assert held == ({"gate", "up"} if lean else {"gate", "up", "activated", "product"})
    y.sum().backward()


# ---- where it must keep out ----


def test_other_tensors_in_the_same_storage_are_left_alone(kept: Kept) -> None:
    """A changed activation is not the activation: its saved values are the changed ones."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.act, self.outer = nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.act(self.inner(x)).mul_(3.0))

    torch.manual_seed(0)
    block = Scaled()
    x = torch.randn(TOKENS, HIDDEN)
    assert_prepared_alike(block, x)
    assert kept.again == []


def test_an_input_changed_before_the_backward_pass_is_refused() -> None:
    block = nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))
    prepare(block)
    inner: list[Tensor] = []
    block[0].register_forward_hook(lambda module, args, output: inner.append(output))
    with recomputing(block):
        y = block(torch.randn(TOKENS, HIDDEN))
    with torch.no_grad():
        inner[0].add_(1.0)
    with pytest.raises(RuntimeError, match="in place"):
        torch.autograd.grad(y.sum(), list(block.parameters()))


def test_a_block_that_computes_something_else_is_not_taken_for_a_gated_one() -> None:
    class Clamped(Qwen2MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(max=1.0))

    block = Clamped(Qwen2Config(hidden_size=HIDDEN, intermediate_size=INNER))
    prepare(block)
    assert "forward" not in block.__dict__


def test_a_copy_answers_from_its_own_weights(kept: Kept) -> None:
    block = gated()
    prepare(block)
    other = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2.0)
    x = torch.randn(1, TOKENS, HIDDEN)
    expected = Qwen2MLP.forward(other, x)
    assert torch.equal(other(x), expected)
    assert not torch.equal(other(x), block(x))


def test_nothing_is_computed_again_without_gradient_or_under_gradient_checkpointing(kept: Kept) -> None:
    block = gated()
    prepare(block)
    x = torch.randn(1, TOKENS, HIDDEN)
    block.gradient_checkpointing = True  # as transformers marks it
    gradients(block, x)
    assert kept.again == []
    block.gradient_checkpointing = False
    with torch.no_grad(), recomputing(block):
        assert recompute._recipes.get() is None
    gradients(block, x)
    assert kept.again


def test_what_is_kept_as_it_is_may_not_change_either() -> None:
    """Autograd leaves its own check to the hooks: without one here, gradients would be silently wrong."""
    linear = nn.Linear(HIDDEN, HIDDEN)
    with recomputing(linear):
        y = linear(torch.randn(TOKENS, HIDDEN)).exp()
        z = y * y
    with torch.no_grad():
        y.add_(1.0)
    with pytest.raises(RuntimeError, match="in place"):
        z.sum().backward()


def test_an_activation_that_somebody_else_changes_is_what_it_was_changed_to(kept: Kept) -> None:
    block = gated()
    block.act_fn.register_forward_hook(lambda module, args, output: output * 2.0)
    x = torch.randn(1, TOKENS, HIDDEN)
    assert_prepared_alike(block, x)
    assert kept.again == []


def test_it_is_computed_again_under_the_forwards_autocast(kept: Kept) -> None:
    """As ``gelu_new`` on CUDA, whose ``pow`` autocast runs in float32: here a step that it runs in bfloat16."""

    class Stepwise(nn.GELU):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.gelu(input.float() @ torch.eye(INNER))

    block = gated()
    block.act_fn = Stepwise()
    x = torch.randn(1, TOKENS, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        plain = block(x)
    expected = torch.autograd.grad(plain.float().square().sum(), list(block.parameters()))
    prepare(block)
    with torch.autocast("cpu", torch.bfloat16), recomputing(block):
        y = block(x)
    mine = torch.autograd.grad(y.float().square().sum(), list(block.parameters()))
    assert len(kept.again) == 2
    for one, other in zip(mine, expected, strict=True):
        assert torch.equal(one, other)


def test_a_block_without_source_is_left_alone() -> None:
    """Such as one of a notebook's cell, or compiled."""
    space: dict[str, Any] = {"Qwen2MLP": Qwen2MLP}
    exec("class Block(Qwen2MLP):\n    def forward(self, x):\n        return self.down_proj(x)", space)
    block = space["Block"](Qwen2Config(hidden_size=HIDDEN, intermediate_size=INNER))
    prepare(block)
    assert "forward" not in block.__dict__


def test_a_block_whose_forward_is_wrapped_is_left_alone() -> None:
    """The source shown would be that of what is wrapped."""

    class Doubled(Qwen2MLP):
        @functools.wraps(Qwen2MLP.forward)
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * Qwen2MLP.forward(self, x)

    block = Doubled(Qwen2Config(hidden_size=HIDDEN, intermediate_size=INNER))
    x = torch.randn(1, TOKENS, HIDDEN)
    expected = block(x)
    prepare(block)
    assert torch.equal(block(x), expected)


def test_a_forward_without_a_backward_leaves_nothing_in_memory() -> None:
    """What is kept for it goes with its result: also an operation's own output, as a softmax keeps it."""
    block = nn.Sequential(gated(), nn.Softmax(dim=-1), nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))
    prepare(block)
    inner: list[StorageWeakRef] = []
    for module in block.modules():
        module.register_forward_hook(lambda module, args, y: inner.append(StorageWeakRef(y.untyped_storage())))
    with recomputing(block):
        y = block(torch.randn(1, TOKENS, HIDDEN))
    assert not all(storage.expired() for storage in inner)
    del y
    assert all(storage.expired() for storage in inner)
