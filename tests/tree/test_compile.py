"""A compiler sees a text layer as one graph, whatever the row: no break at the attention, no graph for each length."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.zoo import FAMILIES, encoded_pairs
from vlmpo.train.batching import lay_out
from vlmpo.tree import attention, segments
from vlmpo.tree.forward import install
from vlmpo.tree.layout import RowLayout, TreeSpan

ROW = RowLayout((TreeSpan(0, 5, (3, 2, 4)), TreeSpan(14, 4, (1,))))
SHARED = [name for name, family in FAMILIES.items() if family.shared]


def states(heads: tuple[int, ...] = (4, 2, 2), grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, ROW.num_tokens, 8) for count in heads]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=grad) for s in shapes]


def blocks() -> Tensor:
    """One image in the first prompt, one in the second."""
    return torch.tensor([-1, 0, 0, -1, -1, *9 * [-1], -1, 1, 1, -1, -1])


@pytest.mark.parametrize(("window", "images"), [(None, False), (4, False), (None, True), (4, True)])
def test_the_operator_does_what_the_segments_do(window: int | None, images: bool) -> None:
    layout = RowLayout(ROW.spans)
    layout.blocks = blocks() if images else None
    query, key, value = states()
    expected = segments.in_segments(query, key, value, layout, 0.3, window).transpose(1, 2)
    got = segments.attend_as_one_op(query, key, value, layout, 0.3, window)
    assert torch.equal(got, expected)
    grad = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, (query, key, value), grad),
        torch.autograd.grad(expected, (query, key, value), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_the_operator_is_registered_as_torch_wants_it(grad: bool) -> None:
    """Schema, shapes, strides and autograd by torch's own check; and a second derivative is not claimed."""
    arguments = (*states(grad=grad), ROW.numbers, None, 0.3, None)
    torch.library.opcheck(torch.ops.vlmpo.attend_in_segments.default, arguments)


def test_a_layout_is_built_again_from_its_numbers() -> None:
    assert ROW.numbers.tolist() == [5, 3, 3, 2, 4, 4, 1, 1]  # a prompt of 5, three responses; a prompt of 4, one
    assert RowLayout.from_numbers(ROW.numbers, None).spans == ROW.spans


def gradients(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def read(model: Any, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, gradients of their weighted sum, and log-probs without gradient."""
    model.zero_grad()
    logps = model(packed_rows=rows)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    with torch.no_grad():
        return logps.detach(), gradients(model), model(packed_rows=rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name == "internvl-qwen2" else pytest.param(name, marks=pytest.mark.long) for name in SHARED],
)
def test_text_layers_of_every_family_are_one_graph_each(name: str) -> None:
    """Rows of one tree and of several, of other lengths and numbers of responses: equal, and nothing compiled anew."""
    torch.compiler.reset()
    family = FAMILIES[name]
    eager, compiled = family.model(0).train(), family.model(0).train()
    counter = CompileCounterWithBackend("aot_eager")
    for model in (eager, compiled):
        install(model, shared=True)
    for layer in compiled.get_decoder().layers:
        layer.compile(fullgraph=True, dynamic=True, backend=counter)
    kinds = list(encoded_pairs(name))
    graphs = []
    for chosen in (kinds[:1], kinds, kinds[::-1], 2 * kinds):
        rows = lay_out([encoded_pairs(name)[kind] for kind in chosen]).rows
        for got, expected in zip(read(compiled, rows), read(eager, rows), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        graphs.append(counter.frame_count)
    # With and without gradient; twice that if layers with and without a window, or with deepstack, differ.
    assert graphs == 4 * [graphs[0]]
    assert graphs[0] <= 5


@pytest.mark.slow
def test_the_kernel_of_one_call_is_traced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that a compiler can read: what is around a kernel, gather and layout, breaks no graph."""

    def dense(query: Tensor, key: Tensor, value: Tensor, parts: Any, scale: float | None) -> Tensor:
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
        q, k = torch.arange(query.shape[0]), torch.arange(key.shape[0])
        q_of = (q[:, None] >= parts.cu_seqlens_q[None, 1:]).sum(1)
        k_of = (k[:, None] >= parts.cu_seqlens_k[None, 1:]).sum(1)
        from_end = parts.cu_seqlens_q[1:][q_of] - q, parts.cu_seqlens_k[1:][k_of] - k
        seen = (q_of[:, None] == k_of) & (from_end[0][:, None] <= from_end[1])
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)

    torch.compiler.reset()
    monkeypatch.setattr(attention, "kernel_for", lambda device: dense)
    family = FAMILIES["internvl-qwen2"]
    eager, compiled = (family.model(0).bfloat16().train() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    for model in (eager, compiled):
        install(model, shared=True)
    for layer in compiled.get_decoder().layers:
        layer.compile(fullgraph=True, dynamic=True, backend=counter)
    pairs = encoded_pairs("internvl-qwen2")
    graphs = []
    for count in range(1, 4):
        rows = lay_out([pairs[kind] for kind in itertools.islice(pairs, count)]).rows
        for row in rows:
            row.vision.update({name: part.bfloat16() for name, part in row.vision.items()})
        for got, expected in zip(read(compiled, rows), read(eager, rows), strict=True):
            torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)
        graphs.append(counter.frame_count)
    assert graphs == 3 * [graphs[0]]
