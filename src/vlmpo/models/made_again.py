"""Keep how a tensor was made in the place of the tensor, until a backward pass needs it.

What an MLP multiplies by its last matrix is the largest thing a layer keeps, and one cheap pass over what is kept
anyway makes it again, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmpo import compat


@dataclass(frozen=True)
class _Place:
    """Locates a saved tensor in the memory of the one that is made again."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def made_again(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Let whatever the body saves of ``tensor`` for a backward pass be made again there, by ``make``.

    Does nothing if no gradient is recorded, while a compiler traces, and under checkpointing or any other hooks on
    saved tensors, which keep nothing of the body or somewhere else.

    Args:
        tensor: without gaps in memory.
        make: returns a tensor of the same values, from tensors that are kept until then.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or compat.saved_tensors_are_hooked():
        yield
        return
    memory: torch.UntypedStorage | None = tensor.untyped_storage()
    dtype = tensor.dtype

    def pack(saved: Tensor) -> Tensor | _Place:
        if saved.dtype != dtype or saved.untyped_storage() is not memory:
            return saved
        return _Place(saved.size(), saved.stride(), int(saved.storage_offset()))

    def unpack(kept: Tensor | _Place) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make().as_strided(kept.size, kept.stride, kept.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    memory = None  # autograd holds ``pack`` as long as what was saved
