"""One attention call for a whole row: what the kernel is handed, and that only a rightly aligned one is trusted.

The kernel here is a slow one in plain torch; the true ones need CUDA and are held to the same by benchmarks/gpu_check.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny_models import image_tree, model, noise_image
from vlmpo.tree import attention, varlen
from vlmpo.tree.forward import install
from vlmpo.tree.layout import RowLayout, Segments, TreeSpan, build_row
from vlmpo.tree.segments import in_segments as by_segments
from vlmpo.tree.varlen import attend_densely, attend_in_one_call, can_read, misreading, visible

CPU = torch.device("cpu")


def slow(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, lower_right: bool = True
) -> Tensor:
    """Segment by segment: query i of n sees keys up to ``i + (keys - n)``; up to i where aligned at the upper left."""
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    q_at, k_at = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    pieces = []
    for number in range(len(q_at) - 1):
        q = query[q_at[number] : q_at[number + 1]]
        k, v = (t[k_at[number] : k_at[number + 1]] for t in (key, value))
        assert q.shape[0] <= segments.max_seqlen_q
        assert k.shape[0] <= segments.max_seqlen_k
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[2] ** -0.5)
        last = torch.arange(q.shape[0])[:, None] + (k.shape[0] - q.shape[0] if lower_right else 0)
        scores = scores.masked_fill(torch.arange(k.shape[0]) > last, -torch.inf)
        pieces.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    assert q_at[-1] == query.shape[0]
    assert k_at[-1] == key.shape[0]
    return torch.cat(pieces)


def upper_left(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
    return slow(query, key, value, segments, scale, lower_right=False)


def layout_from(trees: list[tuple[int, list[int]]]) -> RowLayout:
    spans, start = [], 0
    for prompt, responses in trees:
        spans.append(TreeSpan(start, prompt, tuple(responses)))
        start += prompt + sum(responses)
    return RowLayout(tuple(spans))


def with_gradients(attend: Any, layout: RowLayout, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(layout.num_tokens)
    shapes = [(layout.num_tokens, heads, 8) for heads in (2 * groups, 2, 2, 2 * groups)]
    *inputs, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    inputs = [states.requires_grad_() for states in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def in_segments(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout) -> Tensor:
    query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
    return by_segments(query, key, value, layout, None, None)[0].transpose(0, 1)


def test_segments_worked_out_by_hand() -> None:
    """Prompt 3 with responses of 2, 1 and 2, then prompt 1 with a response of 4."""
    segments = layout_from([(3, [2, 1, 2]), (1, [4])]).segments(CPU)
    assert segments.cu_seqlens_q.tolist() == [0, 5, 6, 8, 13]
    assert segments.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 0, 1, 2, 6, 7, 8, 9, 10, 11, 12]
    assert segments.cu_seqlens_k.tolist() == [0, 5, 9, 14, 19]
    # the first prompt's three tokens are gathered three times, every other token once
    assert segments.places.tolist() == [0, 5, 9, 1, 6, 10, 2, 7, 11, 3, 4, 8, 12, 13, 14, 15, 16, 17, 18]
    assert segments.first_place.tolist() == [0, 3, 6, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert (segments.max_seqlen_q, segments.max_seqlen_k) == (5, 5)
    assert {value.dtype for value in segments if isinstance(value, Tensor)} == {torch.int32}
    moved = segments.to(torch.device("meta"))
    assert [getattr(value, "shape", value) for value in moved] == [getattr(value, "shape", value) for value in segments]


def test_without_further_branches_nothing_is_gathered() -> None:
    segments = layout_from([(3, [2]), (1, [4])]).segments(CPU)
    assert segments.keys is segments.places is segments.first_place is None
    assert segments.cu_seqlens_q.tolist() == segments.cu_seqlens_k.tolist() == [0, 5, 10]


def test_who_sees_whom_worked_out_by_hand() -> None:
    expected = ["1....", "11...", "111..", "11.1.", "11.11"]
    assert ["".join(".1"[int(seen)] for seen in row) for row in visible(layout_from([(2, [1, 2])]))] == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=6)), min_size=1, max_size=4
    ),
    st.integers(1, 3),
)
def test_three_ways_to_read_a_row_agree(trees: list[tuple[int, list[int]]], groups: int) -> None:
    """One call, a call a segment, and a dense mask: outputs and all gradients in float64."""
    layout = layout_from(trees)
    dense = with_gradients(lambda *qkv: attend_densely(*qkv, layout), layout, groups)
    one = with_gradients(lambda *qkv: attend_in_one_call(slow, *qkv, layout.segments(CPU), None), layout, groups)
    many = with_gradients(lambda *qkv: in_segments(*qkv, layout), layout, groups)
    for expected, a, b in zip(dense, one, many, strict=True):
        torch.testing.assert_close(a, expected, atol=1e-11, rtol=0)
        torch.testing.assert_close(b, expected, atol=1e-11, rtol=0)


def test_the_trial_tells_alignments_apart() -> None:
    def nan(*arguments: Any) -> Tensor:
        return slow(*arguments) * torch.nan

    def wrong_backward(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        return slow(query, 2 * key - key.detach(), *rest)  # right outputs, the keys' gradient twice what it is

    assert misreading(slow, CPU) < 0.01
    assert misreading(slow, CPU, torch.float16) < 0.01
    assert misreading(upper_left, CPU) > 0.2
    assert misreading(wrong_backward, CPU) > 0.5
    assert misreading(nan, CPU) == float("inf")


def test_the_trial_works_wherever_the_first_row_is_read() -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert misreading(slow, CPU) < 0.01
    with torch.inference_mode():
        assert misreading(slow, CPU) < 0.01


def absent() -> varlen.Kernel:
    raise ImportError("no such package\nat all")


def test_the_first_kernel_that_is_right_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "CANDIDATES", {"a": absent, "b": lambda: upper_left, "c": lambda: slow})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert varlen.first_trusted(CPU) is slow


def test_where_none_is_right_one_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "CANDIDATES", {"a": absent, "b": lambda: upper_left})
    with pytest.warns(RuntimeWarning, match=r"a: no such package; b: off by 0\.\d+ where rounding") as caught:
        assert varlen.first_trusted(CPU) is None
    assert len(caught) == 1


def test_torch_kernel_is_called_as_this_torch_wants() -> None:
    """Shapes only, on tensors that hold nothing; whether its values are right is for a GPU to say."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = layout_from([(3, [2, 1]), (2, [4])])
    with FakeTensorMode():
        query, key = (torch.empty(layout.num_tokens, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))
        assert (
            attend_in_one_call(varlen._torch_kernel(), query, key, key, layout.segments(CPU), 0.1).shape == query.shape
        )


def test_off_cuda_there_is_no_kernel() -> None:
    assert varlen.kernel_for(CPU) is None


def test_what_one_call_cannot_say_is_left_to_segments() -> None:
    layout = layout_from([(3, [2, 4])])
    assert can_read(layout, torch.bfloat16, 64, None)
    assert can_read(layout, torch.float16, 64, 7)  # prompt and longest response just fit into the window
    assert not can_read(layout, torch.float16, 64, 6)
    assert not can_read(layout, torch.float32, 64, None)
    assert not can_read(layout, torch.bfloat16, 60, None)
    assert not can_read(layout, torch.bfloat16, 512, None)
    layout.blocks = torch.full((9,), -1)
    assert not can_read(layout, torch.bfloat16, 64, None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_reads_the_same_by_one_call(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    """float32 weights under bf16 autocast, as trained: rotated queries come as float32, values as bf16."""
    trees = [image_tree([noise_image(60, 60, i)], [5 + i, 9, 2][: 3 - i], i) for i in range(2)]
    calls = []

    def counted(*args: Any) -> Tensor:
        calls.append({states.dtype for states in args[:3]})
        return slow(*args)

    found = []
    for kernel in (None, counted, upper_left):
        monkeypatch.setattr(attention, "kernel_for", lambda device, kernel=kernel: kernel)
        ours = model().train()
        install(ours, shared=True)
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = ours(packed_rows=[build_row(trees)])
        logps.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in ours.parameters()])
        found.append((logps.detach(), gradient))
    layers = len(ours.model.language_model.layers)
    assert calls == [{torch.bfloat16}] * layers * (2 if checkpointing else 1)
    (plain, plain_gradient), (one, one_gradient), (wrong, _) = found
    assert (plain - one).abs().mean() < 0.02
    assert (plain_gradient - one_gradient).norm() / plain_gradient.norm() < 0.05
    assert (plain - wrong).abs().mean() > 0.1  # negative control: a misaligned kernel shows
