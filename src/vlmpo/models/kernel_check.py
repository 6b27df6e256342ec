"""Compare fused kernels with the plain modules that they replace, on random values of a real size, before a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmpo import compat
from vlmpo.errors import first_line
from vlmpo.models.families import Fused
from vlmpo.models.kernels import Functions, fusable, fused_forward

TOKENS = 2048
_MANY = 40_000  # rows of a narrow norm, one a head: kernels read them in another way
_NARROW = 256
_FAINT = 512  # rows of a norm whose variance is as small as its epsilon
_ROUNDING = 1e-5  # relative, beside twice the plain module's own

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """Holds a plain computation, the fused one, and random float32 inputs of a real size.

    Attributes:
        label: class and width.
        plain, fused: from the inputs to outputs.
        inputs: all of them have gradients.
    """

    label: str
    plain: Function
    fused: Function
    inputs: list[Tensor]


def kinds_that_agree(
    models: list[Any], kinds: tuple[str, ...], functions: Functions, *, device: torch.device, dtypes: set[torch.dtype]
) -> dict[str, str | None]:
    """Return, for each of ``kinds`` that the models have modules of, None if it agrees to rounding, or why not.

    Args:
        models: whose modules are to be computed.
        kinds: see vlmpo.models.families.Fused.
        functions: the kernels.
        device: where to compare.
        dtypes: the types that the run computes in; float32 is compared too, as its rounding hides no fault.
    """
    seen: set[Any] = set()
    found: dict[str, str | None] = {}
    for module, fused in (each for model in models for each in fusable(model)):
        mark = (type(module), fused, width_of(module, fused), type(getattr(module, "act_fn", None)))
        if fused.kind not in kinds or mark in seen or found.get(fused.kind):
            continue
        seen.add(mark)
        found[fused.kind] = why_not(module, fused, functions, device=device, dtypes=dtypes)
    return found


def why_not(
    module: Any, fused: Fused, functions: Functions, *, device: torch.device, dtypes: set[torch.dtype]
) -> str | None:
    """Return where the kernel and the plain module differ by more than rounding, or its error; None if they agree."""
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for dtype in sorted({*dtypes, torch.float32}, key=str):
                for case in cases_of(module, fused, functions, device):
                    if (fault := disagreement(case, dtype)) is not None:
                        return fault
    except Exception as error:  # a compiler that is missing, a driver that is too old: the plain module does it
        return f"{type(module).__name__}: {type(error).__name__}: {first_line(error)}"
    return None


def disagreement(case: Case, dtype: torch.dtype) -> str | None:
    """Return where kernel and plain module differ by more than rounding in ``dtype``, gradients too; else None."""
    exact = with_gradients(case.plain, case.inputs, torch.float32)
    plain = with_gradients(case.plain, case.inputs, dtype)
    fused = with_gradients(case.fused, case.inputs, dtype)
    for expected, ours, theirs in zip(exact, fused, plain, strict=True):
        error, bound = relative(ours, expected), 2 * relative(theirs, expected) + _ROUNDING
        if not error <= bound or ours.dtype != theirs.dtype:  # NaN is no agreement
            name = str(dtype).removeprefix("torch.")
            return f"{case.label} in {name} is off by {error:.2g} where rounding explains {bound:.2g}"
    return None


def relative(tensor: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm."""
    return float((tensor.double() - expected.double()).norm() / expected.double().norm())


def with_gradients(function: Function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the outputs of ``function`` and the gradients of all its inputs, in ``dtype``."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
    # Kernels may write into what they are given, which must not be a leaf.
    outputs = function(*(leaf * 1 for leaf in leaves))
    generator = torch.Generator(leaves[0].device).manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, grads)
    return [*(out.detach() for out in outputs), *gradients]


# ---- cases ----


def width_of(module: Any, fused: Fused) -> int:
    """Return the last dimension that a kernel reads."""
    if fused.kind == "rotary":
        return int(module.head_dim)
    if fused.kind in ("glu", "mlp"):
        first = module.gate_proj if fused.kind == "glu" else getattr(module, fused.parts[0])
        return int(first.out_features)
    weight = module.weight
    return int(getattr(weight, "ds_shape", weight.shape)[-1])  # under ZeRO-3 a weight here is empty


def cases_of(
    module: Any, fused: Fused, functions: Functions, device: torch.device, tokens: int = TOKENS
) -> Iterator[Case]:
    """Yield the cases of one module, of its class and width, on ``tokens`` tokens; weights are random."""
    width = width_of(module, fused)
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    forward, label = fused_forward(module.__class__, fused, functions), f"{type(module).__name__} of {width}"
    if fused.kind == "rotary":
        yield _rotation(module, functions, noise, tokens)
    elif fused.kind == "glu":
        states = [noise(1, tokens, width), noise(1, tokens, width)]
        yield Case(label, _on_projections(module, type(module).forward), _on_projections(module, forward), states)
    elif fused.kind == "mlp":
        plain, ours = (_on_first(module, fused.parts, each) for each in (type(module).forward, forward))
        yield Case(label, plain, ours, [noise(1, tokens, width)])
    else:
        weights = [0.1 * noise(width) + (1.0 - fused.offset)]
        weights += [noise(width)] if fused.kind == "layer_norm" else []
        cases = {tokens: 1.0, _FAINT: getattr(module, fused.eps) ** 0.5}
        cases |= {_MANY: 1.0} if fused.kind == "rms_norm" and width <= _NARROW else {}
        for rows, scale in cases.items():
            inputs = [scale * noise(1, rows, width), *weights]
            yield Case(label, _on_weights(module, type(module).forward), _on_weights(module, forward), inputs)


class _Given(nn.Module):
    """Returns a tensor whatever it is given, in the place of a projection."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, _: Any) -> Tensor:
        return self.result


def _on_projections(module: Any, forward: Callable[..., Any]) -> Function:
    def function(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        parts = {"gate_proj": _Given(gate), "up_proj": _Given(up), "down_proj": _Square()}
        return (forward(_shell(module, modules={**parts, "act_fn": module.act_fn}), None),)

    return function


def _on_first(module: Any, parts: tuple[str, str, str], forward: Callable[..., Any]) -> Function:
    first, activation, second = parts

    def function(inner: Tensor) -> tuple[Tensor, ...]:
        # The second matrix keeps what it is given, as a projection does.
        given = {first: _Given(inner), activation: getattr(module, activation), second: _Square()}
        return (forward(_shell(module, modules=given), None),)

    return function


class _Square(nn.Module):
    """Squares what it is given: its gradient needs the very values."""

    def forward(self, states: Tensor) -> Tensor:
        return states * states


def _on_weights(module: Any, forward: Callable[..., Any]) -> Function:
    def function(states: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(("weight", "bias"), weights, strict=False))
        return (forward(_shell(module, parameters=named), states),)

    return function


def _shell(module: Any, *, parameters: dict[str, Any] | None = None, modules: dict[str, Any] | None = None) -> Any:
    """Return a module of the same class and settings with other contents, whose weights may be anywhere."""
    shell = object.__new__(type(module))
    kept = {name: value for name, value in vars(module).items() if name != "forward"}
    shell.__dict__ = {**kept, "_parameters": parameters or {}, "_modules": modules or {}, "_buffers": {}}
    return shell


def _rotation(module: Any, functions: Functions, noise: Callable[..., Tensor], tokens: int) -> Case:
    head = width_of(module, Fused("rotary"))
    angles = noise(1, tokens, head // 2)
    angles = torch.cat([angles, angles], dim=-1)
    plain = compat.rotation_of(type(module))

    def by(rotate: Callable[..., Any]) -> Function:
        def function(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
            cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
            return tuple(rotate(query.transpose(1, 2), key.transpose(1, 2), cos, sin))

        return function

    heads = [int(matrix.out_features) // head for matrix in (module.q_proj, module.k_proj)]
    states = [noise(1, tokens, number, head) for number in heads]
    return Case(f"{type(module).__name__}'s rotation of {head}", by(plain), by(functions.rotary), states)
