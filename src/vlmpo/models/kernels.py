"""Compute norms, MLPs and rotations by fused kernels, liger-kernel's or torch's, bound to a model's own modules.

liger-kernel's own patches replace classes and functions of transformers for the whole process, so they are never
called. Here a module gets a bound method ``forward`` of its own. Hooks, gathered weights, adapters, checkpointing and
state dicts see the same module as before; a deep copy reads its own weights; other models stay as they are. What the
kernels cannot read (a CPU's tensors, float64, weights and states of different types) the module reads as it always did.
"""

from __future__ import annotations

import functools
import importlib.util
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from vlmpo import compat
from vlmpo.models.adapters import unwrap_peft
from vlmpo.models.families import FAMILIES, Fused, family_of, fused_of
from vlmpo.models.made_again import made_again

# The kinds that a run uses. A kind that does not pay is taken out here; vlmpo.models.families lists what each is for.
USED = ("rms_norm", "glu", "mlp", "rotary")
_NOUNS = {
    "rms_norm": "RMS norms",
    "glu": "gated MLPs",
    "mlp": "plain MLPs",
    "layer_norm": "layer norms",
    "rotary": "rotations",
}
# States of at least so many features are normed by torch's own kernel: one launch where liger-kernel has three, and as
# fast. Narrow ones, heads of an attention, it reads at a quarter of liger-kernel's speed (benchmarks/results/gpu.md).
_WIDE = 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the kernels compute in float32 inside


@dataclass(frozen=True)
class Functions:
    """Holds the differentiable functions behind the kernels, and the type of device that they run on.

    Attributes:
        name: of the library, with its version.
        device: a device's type.
        rms_norm: ``(states, weight, eps, offset, casting)``.
        silu_mul, gelu_mul: ``(gate, up)`` to ``act(gate) * up``, GELU by its tanh form. Their backward writes into gate
            and up: it can run once a forward.
        layer_norm: ``(states, weight, bias, eps)``.
        rotary: ``(query, key, cos, sin)``, ``[1, heads, tokens, head]`` and ``[1, tokens, head]``. It writes into query
            and key.
    """

    name: str
    device: str
    rms_norm: Callable[[Tensor, Tensor, float, float, str], Tensor]
    silu_mul: Callable[[Tensor, Tensor], Tensor]
    gelu_mul: Callable[[Tensor, Tensor], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

    def can_read(self, states: Tensor, *others: Tensor) -> bool:
        """Return whether the functions take ``states``, and ``others`` of the same type with them."""
        fits = states.device.type == self.device and states.dtype in DTYPES and states.numel() > 0
        return fits and all(other.dtype == states.dtype for other in others)


def why_absent() -> str | None:
    """Return which package is missing for the kernels; None if all are there."""
    missing = [name for name in ("liger_kernel", "triton") if importlib.util.find_spec(name) is None]
    return f"{missing[0].replace('_', '-')} is not installed (pip install 'vlmpo[cuda]')" if missing else None


def load_functions() -> Functions:
    """Import liger-kernel's functions, the Triton ones whatever LIGER_KERNEL_IMPL says; it needs a GPU's driver."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rms_norm(states: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        if not offset and weight.numel() >= _WIDE:
            return torch.nn.functional.rms_norm(states, weight.shape, weight, eps)
        # Not in place: if the output goes into a sum, the incoming gradient is the residual's too.
        return LigerRMSNormFunction.apply(states, weight, eps, offset, casting, False)

    return Functions(
        name=f"liger-kernel {version('liger-kernel')}",
        device="cuda",
        rms_norm=rms_norm,
        silu_mul=LigerSiLUMulFunction.apply,
        gelu_mul=LigerGELUMulFunction.apply,
        layer_norm=LigerLayerNormFunction.apply,
        rotary=LigerRopeFunction.apply,
    )


# ---- modules ----

Forward = Callable[..., Any]


def fusable(model: Any) -> Iterator[tuple[nn.Module, Fused]]:
    """Yield the modules of ``model`` that a kernel may compute, each with its row of the families table.

    A family that has no row, a class that has none, and a module whose forward something has replaced are left out.
    """
    base = unwrap_peft(model)
    if family_of(base.config).model_type not in FAMILIES:
        return
    for module in base.modules():
        fused = fused_of(module)
        if fused is not None and _is_plain(module, fused):
            yield module, fused


def _is_plain(module: Any, fused: Fused) -> bool:
    """Return whether the module has what a kernel needs, and nothing but a kernel has replaced its forward."""
    if not is_bound(module) and "forward" in vars(module) and not was_pickled(module):
        return False
    if fused.kind == "glu":
        return _product(module.act_fn) is not None
    if fused.kind == "mlp":
        return all(hasattr(module, part) for part in fused.parts)
    if fused.kind == "layer_norm":
        return module.weight is not None and module.bias is not None and len(module.normalized_shape) == 1
    return True


def _product(activation: Any) -> str | None:
    """Return the name of the function that multiplies by ``activation``; None if there is none."""
    if isinstance(activation, SiLUActivation | nn.SiLU):
        return "silu_mul"
    return "gelu_mul" if isinstance(activation, GELUTanh) else None


def is_bound(module: Any) -> bool:
    """Return whether a kernel computes ``module``."""
    return hasattr(vars(module).get("forward"), "vlmpo_kernel")


def was_pickled(module: Any) -> bool:
    """Return whether a forward of the module's own was lost in pickling: a bound method is kept by its name alone.

    Unpickled, the module holds its class's forward in that place.
    """
    return getattr(vars(module).get("forward"), "__func__", None) is type(module).forward


def bind(module: Any, fused: Fused, functions: Functions) -> None:
    """Compute ``module`` by a kernel from now on."""
    module.forward = types.MethodType(fused_forward(module.__class__, fused, functions), module)


def unbind(model: nn.Module) -> None:
    """Let every module of ``model`` compute what it did before kernels were bound."""
    for module in model.modules():
        if is_bound(module):
            del module.forward


@functools.cache
def fused_forward(kind: Any, fused: Fused, functions: Functions) -> Forward:
    """Return the forward of a class of modules, by a kernel if it can read what comes: ``forward(module, states)``."""
    forward = _FORWARDS[fused.kind](kind, fused, functions)
    forward.vlmpo_kernel = fused.kind  # type: ignore[attr-defined]
    return forward


def _rms_norm(kind: Any, fused: Fused, functions: Functions) -> Forward:
    def forward(self: Any, states: Tensor) -> Any:
        if not functions.can_read(states, self.weight):
            return kind.forward(self, states)
        return functions.rms_norm(states, self.weight, getattr(self, fused.eps), fused.offset, fused.casting)

    return forward


def _layer_norm(kind: Any, fused: Fused, functions: Functions) -> Forward:
    def forward(self: Any, states: Tensor) -> Any:
        # Autocast makes torch's own layer norm return float32.
        if torch.is_autocast_enabled(states.device.type) or not functions.can_read(states, self.weight, self.bias):
            return kind.forward(self, states)
        return functions.layer_norm(states, self.weight, self.bias, getattr(self, fused.eps))

    return forward


def _glu(kind: Any, fused: Fused, functions: Functions) -> Forward:
    def forward(self: Any, states: Tensor) -> Any:
        gate, up = self.gate_proj(states), self.up_proj(states)
        if not functions.can_read(gate, up):
            return self.down_proj(self.act_fn(gate) * up)
        multiply = getattr(functions, _product(self.act_fn) or "")
        product = multiply(gate, up)
        with made_again(product, lambda: multiply(gate, up)):
            return self.down_proj(product)

    return forward


def _mlp(kind: Any, fused: Fused, functions: Functions) -> Forward:
    first, activation, second = fused.parts

    def forward(self: Any, states: Tensor) -> Any:
        inner, activate = getattr(self, first)(states), getattr(self, activation)
        active = activate(inner)
        if not functions.can_read(active):
            return getattr(self, second)(active)
        with made_again(active, lambda: activate(inner)):
            return getattr(self, second)(active)

    return forward


def _rotary(kind: Any, fused: Fused, functions: Functions) -> Forward:
    plain = compat.rotation_of(kind)

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *further: Any, **named: Any) -> Any:
        whole = cos.dim() == 3 and cos.shape[-1] == query.shape[-1]
        if further or named or not whole or not functions.can_read(query, key, cos, sin):
            return plain(query, key, cos, sin, *further, **named)
        return functions.rotary(query, key, cos, sin)

    return compat.rotating_by(kind, rotate)


_FORWARDS: dict[str, Callable[[Any, Fused, Functions], Forward]] = {
    "rms_norm": _rms_norm,
    "glu": _glu,
    "mlp": _mlp,
    "layer_norm": _layer_norm,
    "rotary": _rotary,
}


# ---- models ----


class Kernels:
    """Binds the same kernels to all models of a run, so that policy and reference read alike.

    Args:
        kinds: the kinds to bind; none by default.
        functions: what computes them.

    Attributes:
        kinds: the kinds that are bound, sorted.
    """

    def __init__(self, kinds: Iterable[str] = (), functions: Functions | None = None) -> None:
        self.kinds = tuple(sorted(kinds))
        self._functions = functions
        self._can = frozenset(self.kinds)
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def bind(self, model: nn.Module) -> Counter[str]:
        """Bind the kernels to the modules of ``model`` and return how many of each kind; unbind all others."""
        self._models.add(model)
        unbind(model)
        counts: Counter[str] = Counter()
        if self._functions is not None:
            for module, fused in fusable(model):
                if fused.kind in self.kinds:
                    bind(module, fused, self._functions)
                    counts[fused.kind] += 1
        return counts

    def use(self, kinds: Iterable[str]) -> None:
        """Bind those of ``kinds`` that can be used here, and no others, to all models that :meth:`bind` was given."""
        self.kinds = tuple(sorted(self._can & set(kinds)))
        for model in list(self._models):
            self.bind(model)

    @property
    def key(self) -> str:
        """What decides log-probs, for keys of a store; empty without kernels."""
        assert self._functions is not None or not self.kinds
        return f"{self._functions.name} {','.join(self.kinds)}" if self._functions and self.kinds else ""

    def describe(self, counts: Counter[str]) -> str:
        """Return one phrase on modules that :meth:`bind` counted."""
        words = [f"{counts[kind]} {_NOUNS[kind]}" for kind in self.kinds if counts[kind]]
        return f"{self._functions.name} for {' and '.join(words)}" if self._functions and words else "none"
