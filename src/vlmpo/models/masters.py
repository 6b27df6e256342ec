"""Let a model of float32 weights be read and trained in bfloat16, its own weights staying what they are.

While the model is read, each of its modules holds a bfloat16 rounding of its weights in their place, so that everything
inside computes in bfloat16, without autocast and its conversions of activations. The roundings are made once an
optimizer step. The model's own parameters are the masters: optimizer, average, checkpoints and data-parallel wrappers
go on seeing float32 leaves, whose gradients are float32 and are added up in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlmpo import compat

HALF = torch.bfloat16


class Masters:
    """Puts roundings in the place of a model's float32 weights while it is read.

    Buffers (rotary frequencies, for one) are not rounded, and no weight of another type than float32.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept = self._in_place = False
        self.forget()

    def forget(self) -> None:
        """Free the roundings; the next reading makes them anew."""
        self._roundings: dict[nn.Parameter, Tensor] = {}
        self._places: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        self._blocks: list[list[nn.Parameter]] = []
        self._made_of: list[Any] | None = None

    def moved(self) -> None:
        """Round the weights again at the next reading: an optimizer may move them without a trace that torch sees."""
        self._made_of = None

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold the roundings in the weights' place in the body, a forward; with gradient they lead to the masters."""
        nested = self._in_place
        if not nested or torch.is_grad_enabled():
            self.renew()
        try:
            yield
        finally:
            if not nested and not (self._kept and torch.is_grad_enabled()):
                self._put_back()

    @contextmanager
    def kept_for_backward(self) -> Iterator[None]:
        """Leave in place what a forward in the body reads with gradient: a backward pass may compute layers again."""
        self._kept = True
        try:
            yield
        finally:
            self._kept = False
            self._put_back()

    def renew(self) -> None:
        """Put fresh roundings in the weights' place: gradients of what is read by one and by the next meet in float32.

        Tied weights have one master and one rounding.
        """
        self._round()
        read: dict[nn.Parameter, Tensor] = dict(self._roundings)
        for block in self._blocks if torch.is_grad_enabled() else ():
            trained = [master for master in block if master.requires_grad]
            if trained:
                rounded = _Rounding.apply([self._roundings[master] for master in trained], *trained)
                compat.run_backward_first(rounded[0])
                read.update(zip(trained, rounded, strict=True))
        self._in_place = True
        for parameters, name, master in self._places:
            parameters[name] = read[master]

    def _put_back(self) -> None:
        for parameters, name, master in self._places:
            parameters[name] = master
        self._in_place = False

    def _round(self) -> None:
        """Bring the roundings up to date, if a weight was moved or replaced since they were made."""
        if self._in_place or (self._made_of is not None and self._made_of == self._state()):
            return
        self._find()
        with torch.inference_mode(False), torch.no_grad():
            masters = list(dict.fromkeys(master for _, _, master in self._places))
            old = self._roundings
            self._roundings = {m: old[m] if _fits(old.get(m), m) else _place_for(m) for m in masters}
            compat.copy_each(list(self._roundings.values()), masters)
        self._made_of = self._state()

    def _find(self) -> None:
        """Find where the float32 weights are, and which of them make a layer."""
        every = compat.parameter_places(self._model)
        self._places = [place for place in every if place[2].dtype == torch.float32]
        blocks: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.dtype == torch.float32:
                blocks.setdefault(_layer_of(name), []).append(parameter)
        self._blocks = list(blocks.values())

    def _state(self) -> list[Any]:
        """Return what changes if a weight does."""
        return [(id(m), m.data_ptr(), m.dtype, compat.version(m)) for _, _, m in self._places]


class _Rounding(torch.autograd.Function):
    """Returns the roundings of one layer's weights; gives the weights float32 gradients once all are there."""

    @staticmethod
    def forward(ctx: Any, roundings: list[Tensor], *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(rounding.detach() for rounding in roundings)  # the same memory

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = [None if g is None else torch.empty(g.shape, dtype=torch.float32, device=g.device) for g in grads]
        compat.copy_each([g for g in wide if g is not None], [g for g in grads if g is not None])
        return (None, *wide)


def _layer_of(name: str) -> str:
    """Return the name of the layer that a parameter is in; outside of layers, the parameter's own."""
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])


def _place_for(master: nn.Parameter) -> nn.Parameter:
    """Return room for a rounding. PEFT's adapters of experts put in its place only what is a parameter itself."""
    return nn.Parameter(torch.empty_like(master, dtype=HALF), requires_grad=False)


def _fits(rounding: Tensor | None, master: Tensor) -> bool:
    return rounding is not None and rounding.shape == master.shape and rounding.device == master.device


def round_weights(model: nn.Module) -> None:
    """Round the float32 weights of ``model`` itself, which only answers, to bfloat16: it then reads as masters do."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(HALF)


def rounded_copy(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that reads as masters do, sharing the weights that are not rounded; it stays as it is.

    Its float32 weights are never copied as such, which would take three times the memory.
    """
    tensors = [*model.parameters(), *model.buffers()]
    roundings = [_place_for(t) if isinstance(t, nn.Parameter) and t.dtype == torch.float32 else t for t in tensors]
    with torch.no_grad():
        for rounding, tensor in zip(roundings, tensors, strict=True):
            if rounding is not tensor:
                rounding.copy_(tensor)
    return copy.deepcopy(model, {id(tensor): new for tensor, new in zip(tensors, roundings, strict=True)})


def can_be_masters(model: nn.Module) -> bool:
    """Return whether all weights of ``model`` are float32: none of another type, none quantised."""
    return all(parameter.dtype == torch.float32 for parameter in model.parameters())
