"""Keep a frozen model's weights in host memory, and on their device only while the model is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from vlmpo.log import logger
from vlmpo.train.device_memory import free_bytes

_GIB = 1024**3
_LEAST_ROOM = 1 / 8  # of a card's memory: what rows need to be worth reading at once


class Resting(Protocol):
    """Has weights that can rest in host memory."""

    def rest_on_host(self) -> bool:
        """Keep them there between uses from now on; return whether that frees any memory."""


class HostWeights:
    """Moves a model's weights and buffers to host memory when it is made, and to their device in a ``with`` statement.

    The copies in host memory are pinned if the device is a CUDA device, and stay: nothing is ever copied back, as the
    weights never change.

    Args:
        model: a model that never trains, whole on this rank.
        bring: returns a tensor on the device; None: a copy on the device that the model's weights are on now.
    """

    def __init__(self, model: nn.Module, bring: Callable[[Tensor], Tensor] | None = None) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
        device = self._tensors[0].device
        self._bring = bring or (lambda tensor: tensor.to(device, non_blocking=True))
        self._host = [_on_host(tensor.detach()) for tensor in self._tensors]
        self._leave()

    def _leave(self) -> None:
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Have the weights on their device in the body."""
        try:
            for tensor, host in zip(self._tensors, self._host, strict=True):
                tensor.data = self._bring(host)
            yield
        finally:
            self._leave()


def _on_host(tensor: Tensor) -> Tensor:
    host = tensor.cpu()
    return host.pin_memory() if tensor.is_cuda else host


def can_rest(model: nn.Module) -> bool:
    """Return whether ``model`` takes a device's memory that it can leave.

    Quantised weights cannot, as parts of them would stay behind, and neither can those that other ranks hold parts of.
    """
    weights = [*model.parameters(), *model.buffers()]
    plain = all(type(weight) in (nn.Parameter, Tensor) for weight in weights)
    return plain and any(weight.device.type != "cpu" for weight in weights)


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """Return the bytes of a CUDA device that this process could still take, and all it has; None for other devices."""
    return (free_bytes(device), torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else None


def make_room(reference: Resting, memory: tuple[int, int] | None, needed: int) -> bool:
    """Keep ``reference`` in host memory between uses if rows would lack room otherwise; log it, return whether it is.

    Args:
        reference: of the run.
        memory: what :func:`free_memory` returned.
        needed: bytes that will be taken beside the rows.
    """
    if memory is None or memory[0] - needed >= memory[1] * _LEAST_ROOM or not reference.rest_on_host():
        return False
    free, wanted = memory[0] / _GIB, needed / _GIB
    logger.info(
        f"reference: kept in host memory between uses, as {free:.1f} GiB of the device were free beside it, and "
        f"gradients and optimizer take {wanted:.1f}; each use copies its weights (reference.kind: cache reads it once)"
    )
    return True
