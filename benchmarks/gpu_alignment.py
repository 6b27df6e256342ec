"""The kernels that read a row in one call, beside SDPA: relative errors, forward and backward, and milliseconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmpo.tree import segments, varlen
from vlmpo.tree.layout import RowLayout, TreeSpan

Reader = Callable[[list[Tensor], RowLayout], Tensor]  # query, key and value of a row to its attention


def in_segments(states: list[Tensor], layout: RowLayout, masked: bool = False) -> Tensor:
    """Return the attention of a row by SDPA, segment by segment."""
    query, key, value = (part.transpose(0, 1)[None] for part in states)
    return segments.in_segments(query, key, value, layout, None, None, masked)[0].transpose(0, 1)


def in_one_call(kernel: varlen.Kernel) -> Reader:
    """Return a reader that computes a row's attention by ``kernel``."""

    def read(states: list[Tensor], layout: RowLayout) -> Tensor:
        query, key, value = states
        return varlen.attend_in_one_call(kernel, query, key, value, layout.segments(query.device), None)

    return read


def readers() -> dict[str, Callable[[], Reader]]:
    """Return the loaders of SDPA and of every kernel that might be installed."""
    loads = {name: lambda load=load: in_one_call(load()) for name, load in varlen.CANDIDATES.items()}
    return {"segments": lambda: in_segments, **loads}


def layouts(miniature: bool) -> dict[str, RowLayout]:
    """Return the layouts of rows of two trees, one to six responses each, of uneven lengths."""
    by_label = {}
    for count in range(1, 7):
        spans, start = [], 0
        for prompt in (13, 40) if miniature else (130, 517):
            responses = tuple(1 + (37 * (number + prompt)) % (20 if miniature else 200) for number in range(count))
            spans.append(TreeSpan(start, prompt, responses))
            start += prompt + sum(responses)
        by_label[f"{count} responses"] = RowLayout(tuple(spans))
    return by_label


def random_states(layout: RowLayout, heads: int, kv_heads: int, width: int, device: torch.device) -> list[Tensor]:
    """Return query, key, value and the incoming gradient, float32."""
    generator = torch.Generator().manual_seed(layout.num_tokens)
    shapes = [(layout.num_tokens, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def with_gradients(reader: Reader, states: list[Tensor], layout: RowLayout) -> list[Tensor]:
    """Return the output and the gradients of query, key and value."""
    inputs = [state.detach().requires_grad_() for state in states[:3]]
    out = reader(inputs, layout)
    return [out.detach(), *torch.autograd.grad(out, inputs, states[3])]


def errors_of(reader: Reader, device: torch.device, miniature: bool) -> dict[str, float]:
    """Return the largest relative error of output and gradients, by dtype and number of responses."""

    def in_float32(states: list[Tensor], layout: RowLayout) -> Tensor:
        return varlen.attend_densely(*states, layout)  # SDPA under an explicit mask

    errors = {}
    for kind in varlen.HALF:
        for label, layout in layouts(miniature).items():
            states = [state.to(kind) for state in random_states(layout, 6, 2, 64, device)]
            got = with_gradients(reader, states, layout)
            exact = with_gradients(in_float32, [state.float() for state in states], layout)
            pairs = zip(got, exact, strict=True)
            errors[f"{str(kind).removeprefix('torch.')}, {label}"] = max(
                float((a.float() - b).norm() / b.norm()) for a, b in pairs
            )
    if not all(math.isfinite(error) for error in errors.values()):
        raise ValueError(f"not finite: {errors}")
    return errors


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def times_of(reader: Reader, device: torch.device, miniature: bool) -> dict[str, float]:
    """Time forward and backward of two pairs with seven tiles in bf16, 14 heads of 64 on 2; return milliseconds."""
    prompt, length = (40, 12) if miniature else (1832, 225)
    spans = tuple(TreeSpan(start, prompt, (length, length)) for start in (0, prompt + 2 * length))
    layout = RowLayout(spans)
    states = [state.bfloat16() for state in random_states(layout, 14, 2, 64, device)]
    taken = []
    for _ in range(3 if miniature else 20):
        wait_for(device)
        started = time.perf_counter()
        with_gradients(reader, states, layout)
        wait_for(device)
        taken.append(1e3 * (time.perf_counter() - started))
    return {"median": statistics.median(taken[1:]), "min": min(taken[1:])}


def part_attention(run: Any) -> dict[str, Any]:
    """Run the part of gpu_check that compares ways to read a row; see :mod:`benchmarks.gpu_attention`."""
    from benchmarks.gpu_attention import part_attention  # which imports this module

    return part_attention(run)
