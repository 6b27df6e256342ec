"""Plain torch in the place of liger-kernel's functions, which need a GPU: their signatures, types and side effects."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmpo.models.kernels import Functions


class _GatedProduct(torch.autograd.Function):
    """``act(gate) * up`` whose backward writes the gradients over gate and up, as liger-kernel's does."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.tanh = tanh
        return _activation(gate.float(), tanh).to(up.dtype) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()]
            product = _activation(leaves[0], ctx.tanh) * leaves[1]
        of_gate, of_up = torch.autograd.grad(product, leaves, grads[0].double())
        gate.data.copy_(of_gate)  # `.data`: no version is counted, as in a kernel
        up.data.copy_(of_up)
        return gate, up, None


def _activation(gate: Tensor, tanh: bool) -> Tensor:
    return functional.gelu(gate, approximate="tanh") if tanh else functional.silu(gate)


def rms_norm(states: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
    wide = states.contiguous().float()  # kernels return tensors without gaps
    normed = wide / (wide.square().sum(-1, keepdim=True) / wide.shape[-1] + eps).sqrt()
    if casting == "llama":
        return normed.to(states.dtype) * (offset + weight)
    assert casting == "gemma"
    return (normed * (offset + weight.float())).to(states.dtype)


def layer_norm(states: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = states.contiguous().float()
    centred = wide - wide.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return (scaled * weight.float() + bias.float()).to(states.dtype)


class _Rotation(torch.autograd.Function):
    """Rotates queries and keys by halves, in place, and gradients back."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(query, cos, sin), _rotated(key, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin), _rotated(grads[1], cos, -sin), None, None


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    states = states.transpose(1, 2).contiguous()  # not a copy if it was transposed before: in place, as the kernel's
    half = states.shape[-1] // 2
    cos, sin = (part[..., None, :half] for part in (cos, sin))
    first, second = states[..., :half].clone(), states[..., half:].clone()
    states.data[..., :half] = first * cos - second * sin
    states.data[..., half:] = second * cos + first * sin
    return states.transpose(1, 2)


FUNCTIONS = Functions(
    name="stand-in 1",
    device="cpu",
    rms_norm=rms_norm,
    silu_mul=lambda gate, up: _GatedProduct.apply(gate, up, False),
    gelu_mul=lambda gate, up: _GatedProduct.apply(gate, up, True),
    layer_norm=layer_norm,
    rotary=_Rotation.apply,
)


def wrong(name: str, how: float = math.nan) -> Functions:
    """The functions, that of ``name`` adding ``how`` to what it returns."""
    right = getattr(FUNCTIONS, name)
    return Functions(**{**vars(FUNCTIONS), name: lambda *arguments: right(*arguments) + how})
