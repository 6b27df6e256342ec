"""Find weights that are not finite, and name them: a NaN among millions makes every number of a run NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmpo.errors import ModelError


class BadWeight(NamedTuple):
    """Names a weight, and how many of its values are NaN or infinite."""

    name: str
    bad: int
    values: int


def non_finite_weights(model: nn.Module) -> list[BadWeight]:
    """Return the weights of ``model`` that hold a NaN or an infinite value; of sharded ones, this rank's part.

    A sum is not finite if one of its values is not, and takes no memory: only tensors whose sum is not finite are
    looked at value by value. All sums are read from the device at once.
    """
    named = list(_floating(model.named_parameters()))
    suspects = []
    for tensors in _by_device(named):
        sums = torch.stack([tensor.sum().float() for _, tensor in tensors])
        suspects += [tensors[at] for at in torch.nonzero(~torch.isfinite(sums)).flatten().tolist()]
    found = [BadWeight(name, int((~torch.isfinite(tensor)).sum()), tensor.numel()) for name, tensor in suspects]
    return [weight for weight in found if weight.bad]  # a sum of large half-precision values may overflow


def refuse_non_finite(
    model: nn.Module, what: str, gather: Callable[[list[BadWeight]], list[list[BadWeight]]] = lambda bad: [bad]
) -> None:
    """Raise ModelError if a weight is not finite.

    Args:
        model: the model.
        what: what messages call it.
        gather: returns what each rank found: of a sharded model all of them must call this.
    """
    bad = [weight for rank in gather(non_finite_weights(model)) for weight in rank]
    if bad:
        raise ModelError(f"{what}: {describe(bad)}; its file is damaged or the training behind it failed: replace it")


def describe(bad: list[BadWeight]) -> str:
    """Name the first of ``bad`` weights, at least one, and say how many more there are."""
    first, *others = bad
    more = f" ({len(others)} more weights have some)" if others else ""
    return f"weight {first.name} has {first.bad} non-finite values of {first.values}{more}"


def _floating(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the local part of each tensor of floating-point numbers; float8 has no sums."""
    for name, parameter in named:
        tensor = parameter.detach()
        if hasattr(tensor, "to_local"):  # a DTensor of FSDP2
            tensor = tensor.to_local()
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() and not tensor.is_meta:
            yield name, tensor


def _by_device(named: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    for device in dict.fromkeys(tensor.device for _, tensor in named):
        yield [(name, tensor) for name, tensor in named if tensor.device == device]
