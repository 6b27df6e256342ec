"""What lies between hidden states and loss: sums in one order, in float64, and nothing that adds by atomics."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.paths import REPO
from tests.tiny_models import random_pair
from tests.training import pairs, trainer
from vlmpo.loss import implicit_reward
from vlmpo.train.batching import lay_out
from vlmpo.tree.dummies import append_dummy
from vlmpo.tree.forward import sum_by_response
from vlmpo.tree.layout import PackedRow, PromptTree, build_row
from vlmpo.tree.ordered import Select, scored_states


def tree(prompt: int, *lengths: int) -> PromptTree:
    return PromptTree(torch.arange(prompt), tuple(torch.arange(length) for length in lengths))


# ---- sums ----


def test_sums_by_hand() -> None:
    """float32 loses the 1 behind 2**24, and the three halves of its spacing at 3,000; float64 loses nothing."""
    rows = [build_row([tree(2, 2, 3), tree(1, 1)]), build_row([tree(3, 4)])]
    spacing = 2.0**-12  # of float32 between 2,048 and 4,096
    logps = [-(2.0**24), -1.0, -0.5, -0.25, -0.125, -7.0, -3000.0, -spacing / 2, -spacing / 2, -spacing / 2]
    sums = sum_by_response(torch.tensor(logps), rows)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [-16777217.0, -0.875, -7.0, -3000.0 - 1.5 * spacing]


def halves(values: list[float]) -> float:
    """The order, written once more: the first half plus the second, filled up with zeros to a power of two."""
    width = 1
    while width < len(values):
        width *= 2
    values = values + [0.0] * (width - len(values))
    while width > 1:
        width //= 2
        values = [values[at] + values[at + width] for at in range(width)]
    return values[0]


def wide_range(count: int, seed: int) -> Tensor:
    """Float64 values of which every order of summation gives other last bits."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(count, generator=generator, dtype=torch.float64) * 30 - 25
    return -torch.rand(count, generator=generator, dtype=torch.float64) * 2**exponents


def test_a_response_sums_to_the_same_bits_in_every_row() -> None:
    values = {length: wide_range(length, length) for length in (1, 2, 3, 64, 65, 300, 301, 700)}
    expected = {length: halves(logps.tolist()) for length, logps in values.items()}
    assert len({float(values[700].sum()), expected[700], sum(values[700].tolist())}) > 1  # the order shows
    alone = {length: sum_by_response(logps, [build_row([tree(4, length)])]).item() for length, logps in values.items()}
    assert alone == expected
    for lengths in ((1, 2, 3), (300, 64), (64, 300), (3, 700, 1), (301, 301), tuple(values)):
        rows = [build_row([tree(5, *lengths)]), build_row([tree(2, length) for length in lengths])]
        sums = sum_by_response(torch.cat([values[length] for length in lengths] * 2), rows)
        assert sums.tolist() == [expected[length] for length in lengths] * 2


def test_a_number_that_is_not_finite_stays_in_its_response() -> None:
    logps = torch.tensor([-1.0, float("nan"), -2.0, -3.0], requires_grad=True)
    sums = sum_by_response(logps, [build_row([tree(1, 2, 2)])])
    assert sums[0].isnan()
    assert sums[1] == -5.0


def test_the_gradient_of_a_sum() -> None:
    rows = [build_row([tree(2, 2, 3), tree(1, 1)]), build_row([tree(3, 2)])]
    logps = torch.zeros(8, requires_grad=True)
    sum_by_response(logps, rows).backward(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert logps.grad is not None
    assert logps.grad.dtype == torch.float32
    assert logps.grad.tolist() == [1, 1, 2, 2, 2, 3, 4, 4]


# ---- gathers ----


def rows_of_all_kinds() -> dict[str, PackedRow]:
    two_trees = build_row([tree(4, 3, 1, 5), tree(1, 2, 2)])
    return {
        "one response": build_row([tree(3, 4)]),
        "prompts of one token": build_row([tree(1, 1, 1), tree(1, 1)]),
        "many responses": build_row([tree(6, *range(1, 12))]),
        "two trees": two_trees,
        "a dummy behind": append_dummy(two_trees, tree(5, 1)),
    }


@pytest.mark.parametrize("name", rows_of_all_kinds())
def test_gathered_states_and_their_gradient(name: str) -> None:
    row = rows_of_all_kinds()[name]
    hidden = torch.randn(row.layout.num_tokens, 3, dtype=torch.float64)
    weights = torch.randn(len(row.targets), 3, dtype=torch.float64)
    ours, plain = (hidden.clone().requires_grad_() for _ in range(2))
    gathered = scored_states(ours, row)
    assert torch.equal(gathered, plain[row.logit_positions])
    (gathered * weights).sum().backward()
    (plain[row.logit_positions] * weights).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-14, rtol=0)


def test_a_prompts_last_state_adds_its_responses_before_it_rounds() -> None:
    """In bfloat16 256 + 1 is 256, and so it stays however many ones follow, if each sum is rounded."""
    row = build_row([tree(2, 1, 1, 1, 1, 1)])
    hidden = torch.zeros(row.layout.num_tokens, 1, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    scored_states(hidden, row).backward(grad)
    assert hidden.grad is not None
    assert hidden.grad[1].item() == 260.0


def test_selected_values_and_their_gradient() -> None:
    values = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64, requires_grad=True)
    selected = Select.apply(values, torch.tensor([2, 0, 2, 3, 2]))
    assert selected.tolist() == [-3.0, -1.0, -3.0, -4.0, -3.0]
    selected.backward(torch.tensor([1.0, 10.0, 100.0, float("nan"), 1000.0], dtype=torch.float64))
    assert values.grad is not None
    assert values.grad[:3].tolist() == [10.0, 0.0, 1101.0]
    assert values.grad[3].isnan()  # and nowhere else


# ---- rewards of exactly 0 ----


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast", "lora"])
def test_equal_models_give_equal_sums_at_real_lengths(tmp_path: Path, kind: str, shared: bool) -> None:
    """The policy is read with a gradient, the reference without; responses have some hundred tokens."""
    from peft import LoraConfig

    long = [random_pair(seed, images=seed % 3, longest=400) for seed in range(3)]
    run = trainer(
        tmp_path,
        long,
        dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32,
        bf16=kind == "autocast",
        attention="auto" if shared else "separate",
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if kind == "lora" else None,
    )
    run.model.train()
    batch = run._prepare_inputs(lay_out([run.loader_encoder.encode(pair) for pair in long], shared))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        policy, reference, _ = run._response_logps(run.model, batch)
    assert policy.requires_grad
    assert policy.dtype == reference.dtype == torch.float64
    assert float(policy.detach().min()) < -1000
    assert torch.equal(policy.detach(), reference)


def test_a_reward_keeps_what_float32_would_lose() -> None:
    """At 3,000 float32 rounds to 2.4e-4: a difference of 1e-5 nats is nothing there, or thirty times too large."""
    policy = torch.tensor([-3000.0], dtype=torch.float64) + 1e-5
    reward = implicit_reward(policy, torch.tensor([-3000.0], dtype=torch.float64), 0.1)
    assert reward.item() == pytest.approx(1e-6, rel=1e-6)


# ---- no atomics ----

ADDS_BY_ATOMICS = {
    *("index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_reduce"),
    *("index_reduce_", "put", "put_", "bincount", "histc", "embedding_dense_backward", "_unsafe_index_put"),
    *("segment_reduce", "_segment_reduce_backward", "index_fill_", "masked_scatter_backward"),
}
ACCUMULATES = {"index_put", "index_put_", "_index_put_impl_"}  # if told to, and the gradient of indexing does


class Atomics(TorchDispatchMode):
    """Notes every operation, and of all those that add by atomics on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.seen.add(name)
        accumulates = name in ACCUMULATES and ((len(args) > 3 and args[3]) or (kwargs or {}).get("accumulate", False))
        if name in ADDS_BY_ATOMICS or accumulates:
            self.found.add(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def from_the_last_state_on(model: Any) -> Iterator[Atomics]:
    """Note what is done once ``model``'s text part has returned; its own gradients are not computed."""
    mode = Atomics()
    entered = []

    def cut(module: nn.Module, arguments: Any, output: Any) -> None:
        if torch.is_grad_enabled():  # else the reference reads
            output.last_hidden_state = output.last_hidden_state.detach().requires_grad_()
            entered.append(mode.__enter__())

    hook = model.base_model.register_forward_hook(cut)
    try:
        yield mode
    finally:
        hook.remove()
        assert entered
        mode.__exit__(None, None, None)


def test_the_mode_notices() -> None:
    index = torch.tensor([0, 0, 1])
    for wrong, name in (
        (lambda values: values[index], "_index_put_impl_"),
        (lambda values: values.gather(0, index), "scatter_add"),
        (lambda values: values.new_zeros(2).index_add(0, index, values[:3]), "index_add"),
        (lambda values: values.index_select(0, index), "index_add_"),
    ):
        values = torch.zeros(4, requires_grad=True)
        with Atomics() as mode:
            wrong(values).sum().backward()
        assert {found.strip("_") for found in mode.found} & {name.strip("_"), "index_add", "index_put"}, mode.seen


@pytest.mark.parametrize("head", ["plain", "lora"])
def test_nothing_adds_by_atomics_between_hidden_states_and_loss(tmp_path: Path, head: str) -> None:
    """Through the trainer's own loss, of pairs that share a prompt and a response."""
    from peft import LoraConfig

    first = random_pair(0)
    texts = ["red", "blue circle", "two", "red"]
    grouped = [replace(first, chosen=texts[at], rejected=texts[at + 1]) for at in range(3)]
    adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"]) if head == "lora" else None
    run = trainer(tmp_path, grouped, group_by_prompt=3, peft_config=adapter)
    batch = run.data_collator([run.loader_encoder.encode(pair) for pair in [*grouped, *pairs(3, first=5)]])
    run.model.train()
    policy = run.model.base_model.model if head == "lora" else run.model
    for part in batch.micro_batches:
        with from_the_last_state_on(policy) as mode:
            run.compute_loss(run.model, run._prepare_inputs(part), num_items_in_batch={}).backward()
        assert not mode.found
        assert {"index_select", "mm"} <= mode.seen  # both passes were seen


def test_nor_in_the_router_loss() -> None:
    from vlmpo.tree.router_loss import response_router_losses

    row = build_row([tree(4, 3, 5), tree(2, 6)])
    layers = [torch.randn(row.layout.num_tokens, 4, requires_grad=True) for _ in range(2)]
    with Atomics() as mode:
        losses = response_router_losses(layers, row.layout, 2)
        Select.apply(losses, torch.tensor([0, 2, 0])).sum().backward()
    assert not mode.found
    assert layers[0].grad is not None


def test_none_is_named_in_the_source() -> None:
    """A cheap net over what the test above does not run."""
    found = []
    for folder in ("tree", "train", "loss.py"):
        place = REPO / "src" / "vlmpo" / folder
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Attribute) or ast.unparse(node.value) == "np":
                    continue
                if node.attr in ADDS_BY_ATOMICS - {"put"}:
                    found.append(f"{path.name}:{node.lineno}: {node.attr}")
    assert found == []
