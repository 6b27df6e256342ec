"""Attend over a row in one call, by kernels for sequences of different lengths, once a test has shown them right.

Prompt and first response are one segment with its own keys; every further response is a segment whose keys are its
prompt's and its own. That is right only if a kernel aligns a segment's causal mask at the lower right corner, so that a
response's first token sees all of the prompt. Versions of kernels differ in this. Therefore each is tested once a
process, forward and backward, before anything is trained with it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from vlmpo.errors import first_line
from vlmpo.tree.layout import RowLayout, Segments, TreeSpan

HALF = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256  # of flash attention
_ROUNDING = 0.03  # relative; a wrongly aligned mask is off by tenths


class Kernel(Protocol):
    """Attends over segments, causally, aligned at the lower right."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
        """Return ``[tokens, heads, head]``.

        Args:
            query: ``[tokens, heads, head]``.
            key, value: ``[gathered, kv_heads, head]``; ``kv_heads`` divides ``heads``.
            segments: of the row.
            scale: of the scores; None: ``head ** -0.5``.
        """


def _torch_kernel() -> Kernel:
    """Load torch's own kernel, which brings flash attention along."""
    from torch.nn.attention.varlen import varlen_attn

    named = inspect.signature(varlen_attn).parameters
    # Versions without ``enable_gqa`` accept fewer heads of keys anyway.
    further: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in named else {}

    def kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
        starts = segments.cu_seqlens_q, segments.cu_seqlens_k
        longest = segments.max_seqlen_q, segments.max_seqlen_k
        out = varlen_attn(query, key, value, *starts, *longest, scale=scale, window_size=(-1, 0), **further)
        assert isinstance(out, Tensor)  # without auxiliary outputs
        return out

    return kernel


def _flash_attn_kernel() -> Kernel:
    """Load the flash-attn package's kernel, if it is installed."""
    flash_attn_varlen_func = importlib.import_module("flash_attn").flash_attn_varlen_func

    def kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
        starts = segments.cu_seqlens_q, segments.cu_seqlens_k
        longest = segments.max_seqlen_q, segments.max_seqlen_k
        in_order = torch.are_deterministic_algorithms_enabled()  # torch's own kernel reads the switch by itself
        out: Tensor = flash_attn_varlen_func(
            query, key, value, *starts, *longest, softmax_scale=scale, causal=True, deterministic=in_order
        )
        return out

    return kernel


def _flash_attn_3_kernel() -> Kernel:
    """Load FlashAttention 3, which has a package of its own and runs on Hopper alone, if it is installed."""
    flash_attn_varlen_func = importlib.import_module("flash_attn_interface").flash_attn_varlen_func

    def kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
        starts = segments.cu_seqlens_q, segments.cu_seqlens_k
        longest = segments.max_seqlen_q, segments.max_seqlen_k
        out = flash_attn_varlen_func(query, key, value, *starts, *longest, softmax_scale=scale, causal=True)
        attended: Tensor = out[0] if isinstance(out, tuple) else out  # early versions return the log-sums too
        return attended

    return kernel


# In order of preference. A fixed order, and no race at the start: kernels differ in the last bits.
CANDIDATES: dict[str, Callable[[], Kernel]] = {
    "torch": _torch_kernel,
    "flash-attn": _flash_attn_kernel,
    "flash-attn-3": _flash_attn_3_kernel,
}


@functools.cache
def kernel_for(device: torch.device) -> Kernel | None:
    """Return the kernel that reads rows on ``device``; None if SDPA does: off CUDA, or with a warning why.

    The first call on a CUDA device tests the kernels.
    """
    return first_trusted(device) if device.type == "cuda" else None


def first_trusted(device: torch.device) -> Kernel | None:
    """Return the first of CANDIDATES that reads a small row correctly on ``device``; else warn and return None."""
    faults = []
    for name, load in CANDIDATES.items():
        try:
            kernel = load()
            error = misreading(kernel, device)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as fault:
            faults.append(f"{name}: {first_line(fault)}")
            continue
        if error <= _ROUNDING:
            return kernel
        faults.append(f"{name}: off by {error:.2g} where rounding explains {_ROUNDING}")
    warnings.warn(
        f"no attention kernel for rows of responses can be used on {device} ({'; '.join(faults)}); reading them "
        "segment by segment with SDPA: exact, slower",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def misreading(kernel: Kernel, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the relative error of ``kernel`` on a small row, of outputs and gradients; NaN counts as infinite.

    The expected values are those of attention in float32 under a dense mask.
    """
    # The first row may be read under no_grad, autocast or inference mode.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        layout = RowLayout((TreeSpan(0, 5, (3, 2, 4)), TreeSpan(14, 9, (1,)), TreeSpan(24, 2, (6, 70))))
        segments = layout.segments(device)
        generator = torch.Generator().manual_seed(0)
        shapes = [(layout.num_tokens, heads, 64) for heads in (4, 2, 2, 4)]
        states = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        wide = [state.float() for state in states]
        got = _with_gradients(lambda q, k, v: attend_in_one_call(kernel, q, k, v, segments, None), states)
        expected = _with_gradients(lambda q, k, v: attend_densely(q, k, v, layout), wide)
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def _with_gradients(attend: Callable[..., Tensor], states: list[Tensor]) -> list[Tensor]:
    """Return the output of ``attend(query, key, value)`` and the gradients of all three."""
    *inputs, grad = states
    inputs = [state.detach().requires_grad_() for state in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def attend_densely(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout) -> Tensor:
    """Attend by one SDPA call under a dense mask, for checks: ``[tokens, heads, head]`` each."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
    mask = visible(layout).to(query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)[0].transpose(0, 1)


def visible(layout: RowLayout) -> Tensor:
    """Return which tokens each token of a row sees, ``[tokens, tokens]`` bool, for checks."""
    mask = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for span in layout.spans:
        at = span.start + span.prompt
        for length in span.responses:
            mask[at : at + length, span.start : span.start + span.prompt] = True
            at += length
        owner = torch.repeat_interleave(
            torch.arange(1 + len(span.responses)), torch.tensor([span.prompt, *span.responses])
        )
        mask[span.start : at, span.start : at] |= owner[:, None] == owner
    return mask.tril()


def can_read(layout: RowLayout, dtype: torch.dtype, head: int, window: int | None) -> bool:
    """Return whether one call is enough: half precision, no image blocks, no window that cuts anything off."""
    if dtype not in HALF or head % 8 or head > _LARGEST_HEAD or layout.blocks is not None:
        return False
    return window is None or window >= layout.longest


def attend_in_one_call(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None
) -> Tensor:
    """Attend over a whole row by one call of ``kernel``.

    Args:
        kernel: from :func:`kernel_for`.
        query: ``[tokens, heads, head]``.
        key, value: ``[tokens, kv_heads, head]``.
        segments: of the row, on the same device.
        scale: of the scores; None: ``head ** -0.5``.

    Returns:
        ``[tokens, heads, head]``.
    """
    if segments.keys is not None:
        key, value = _Gather.apply(key, value, segments.keys, segments.places, segments.first_place)
    return kernel(query, key, value, segments, scale)


class _Gather(torch.autograd.Function):
    """Gathers a row's keys and values in order of the segments: a prompt's once more for every further response.

    A token's gradient is the sum over its places, added up in their order in float32 or better: ``index_select``'s own
    would add by atomics, in any order.
    """

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, keys: Tensor, places: Tensor, first_place: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(places, first_place)
        return key.index_select(0, keys), value.index_select(0, keys)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        places, first_place = ctx.saved_tensors
        key, value = (
            embedding_bag(places, grad.flatten(1), first_place, mode="sum").unflatten(1, grad.shape[1:])
            for grad in grad_outputs
        )
        return key, value, None, None, None
