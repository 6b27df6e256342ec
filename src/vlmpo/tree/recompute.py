"""Activations that cost next to nothing are computed again in the backward pass, not kept for it.

In an MLP block ``W_down (act(W_gate x) * W_up x)`` autograd keeps four tensors of the inner width: what goes into the
activation, what comes out, the other factor, and the product. Two of them follow from the other two by elementwise
operations; in ``W_2 act(W_1 x)`` (most vision towers) one of two. Those are replaced, as autograd packs them, by how to
compute them. The same operations on the same values: gradients are the same to the last bit.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import types
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

# Their backward passes read their inputs, which are then kept anyway.
_NAMES = ("gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "quick_gelu", "silu", "swish")
_ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.GELU, *(type(ACT2FN[name]) for name in _NAMES))
_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
_SIGNATURE = r"def forward\(self, (?P<x>\w+)(: [\w.]+)?\)( -> [\w.]+)?: "
_BLOCK = r"self\.down_proj\(self\.act_fn\(self\.gate_proj\((?P=x)\)\) \* self\.up_proj\((?P=x)\)\)"
_GATED = re.compile(rf"{_SIGNATURE}((?P<y>\w+) = {_BLOCK} return (?P=y)|return {_BLOCK})")


class _Recipe:
    """How to compute a tensor again, and of which tensor that is true."""

    def __init__(self, result: Tensor, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._result = weakref.ref(result)  # its storage may be another tensor's once it is gone
        self._version = result._version
        self._compute = compute
        self._inputs = tuple(tensor.detach() for tensor in inputs)
        self._versions = [tensor._version for tensor in self._inputs]
        self._autocast = _autocast_of(result.device.type)

    def gives(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is the result as it was, in whatever shape."""
        result = self._result()
        return (
            result is not None
            and tensor._version == self._version
            and tensor.dtype == result.dtype
            and tensor.numel() == result.numel()
            and tensor.is_contiguous()
            and result.is_contiguous()
            and tensor.data_ptr() == result.data_ptr()
        )

    def again(self, shape: torch.Size) -> Tensor:
        """The result, computed anew."""
        for tensor, version in zip(self._inputs, self._versions, strict=True):
            _refuse_if_changed(tensor, version)
        # Some activations have steps that autocast runs in float32: they must now as well.
        with torch.no_grad(), torch.autocast(**self._autocast):
            return self._compute(*self._inputs).view(shape)


def _autocast_of(device: str) -> dict[str, Any]:
    """Arguments of ``torch.autocast`` that make it what it is now."""
    return {
        "device_type": device,
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


def _refuse_if_changed(tensor: Tensor, version: int) -> None:
    """Autograd's own check of what it keeps, which it leaves to the hooks where there are some."""
    if tensor._version != version:
        raise RuntimeError(
            f"one of the variables needed for gradient computation, {tuple(tensor.shape)} {tensor.dtype}, was changed "
            "in place before the backward pass"
        )


_recipes: ContextVar[dict[int, _Recipe] | None] = ContextVar("recipes", default=None)


def note(result: Tensor, compute: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Tell that ``result`` is ``compute(*inputs)``, where somebody listens."""
    recipes = _recipes.get()
    if recipes is not None and result.requires_grad:
        recipes[result.data_ptr()] = _Recipe(result, compute, inputs)


def _is_known(result: Tensor) -> bool:
    """Whether somebody was told how ``result`` came about."""
    recipe = (_recipes.get() or {}).get(result.data_ptr())
    return recipe is not None and recipe.gives(result)


def prepare(model: nn.Module) -> None:
    """Have the MLP blocks of ``model`` tell how their activations come about. Harmless when done twice.

    Other hooks may change what an activation gives: ours is the first, and sees what the module itself computed.
    """
    for module in model.modules():
        if isinstance(module, _ACTIVATIONS):
            if not hasattr(module, "_vlmpo_notes"):
                module._vlmpo_notes = True  # type: ignore[assignment]
                module.register_forward_hook(_after_activation, prepend=True)
        elif "forward" not in module.__dict__ and _is_gated(module):
            module.forward = types.MethodType(_gated_forward, module)


def _after_activation(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    if len(inputs) == 1:
        note(output, module.forward, inputs[0])


def _is_gated(module: nn.Module) -> bool:
    """Whether the block's forward is, word for word, what :func:`_gated_forward` computes."""
    if not all(hasattr(module, part) for part in _PARTS) or not isinstance(module.act_fn, _ACTIVATIONS):
        return False
    forward = type(module).forward
    if hasattr(forward, "__wrapped__"):
        return False  # its source would be that of what is wrapped
    try:
        source = " ".join(inspect.getsource(forward).split())
    except (OSError, TypeError):  # compiled, or made by exec
        return False
    return _GATED.fullmatch(source) is not None


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    gate = self.gate_proj(x)
    activated = self.act_fn(gate)
    up = self.up_proj(x)
    product = activated * up
    if _is_known(activated):
        activation = self.act_fn.forward
        note(product, lambda gate, up: activation(gate) * up, gate, up)
    return self.down_proj(product)


@contextlib.contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Within, what is kept for the backward pass of ``model`` is kept so.

    Not under gradient checkpointing, which keeps still less in its own way, and not where :func:`keep_all` was called.
    """
    if not torch.is_grad_enabled() or getattr(model, "_vlmpo_keeps_all", False) or _checkpoints(model):
        yield
        return
    recipes: dict[int, _Recipe] = {}

    def pack(tensor: Tensor) -> tuple[Tensor, int] | tuple[_Recipe, torch.Size]:
        recipe = recipes.get(tensor.data_ptr())
        if recipe is not None and recipe.gives(tensor):
            return recipe, tensor.shape
        # An operation's own output would hold the operation, and that its output: never freed without a backward pass.
        return tensor if tensor.grad_fn is None else tensor.detach(), tensor._version

    def unpack(kept: Any) -> Tensor:
        what, how = kept
        if isinstance(what, _Recipe):
            return what.again(how)
        _refuse_if_changed(what, how)
        return what

    token = _recipes.set(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _recipes.reset(token)
        recipes.clear()  # those that are needed hang on the graph


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def keep_all(model: Any) -> None:
    """Leave ``model`` to autograd: for wrappers that take weights away between the passes."""
    model._vlmpo_keeps_all = True
