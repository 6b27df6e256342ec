"""Measure what a row takes while it is read forward and backward, and fit it by its tokens and patches.

A pass has two phases: until the gradient reaches the output of the vision tower, all activations are there; behind that
the text model's are gone, and the tower's (or those of the block of tiles that is computed again) are left. The peak of
each grows with tokens and patches, so that a few small rows tell what a large one will take.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vlmpo import compat
from vlmpo.errors import first_line
from vlmpo.tree.layout import PromptTree
from vlmpo.tree.packing import SHARES, RowBound, count_patches
from vlmpo.tree.vision_blocks import patches_of_a_block

# What messages of torch, cuBLAS, cuDNN and MPS have in common if memory is out; of some there is no class of error.
_SIGNS = ("out of memory", "allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")

_MOST_IN_A_BLOCK = 4  # pairs that are read in one row to fill a block of tiles

Result = TypeVar("Result")
Read = Callable[[Sequence[PromptTree]], Tensor]  # reads trees in one row with the policy; returns a loss


class Phase(NamedTuple):
    """Holds the peak of one phase of a pass: ``constant + per_token * tokens + per_patch * patches`` bytes.

    And, if the vision tower is read in blocks of up to ``block`` patches, ``in_block`` bytes for each patch of one.
    """

    constant: int
    per_token: int
    per_patch: int
    in_block: int = 0
    block: int = 0

    def peak(self, tokens: int, patches: int) -> int:
        """Return the bytes that a row of this size takes."""
        of_block = self.in_block * min(patches, self.block)
        return self.constant + self.per_token * tokens + self.per_patch * patches + of_block

    @property
    def fixed(self) -> int:
        """Bytes that a row takes whatever it holds, a whole block of tiles among them."""
        return self.constant + self.in_block * self.block

    def times(self, factor: float) -> Phase:
        """Return the peak if everything takes ``factor`` times as much."""
        return Phase(*(int(factor * size) for size in self))._replace(block=self.block)


class RowMemory(NamedTuple):
    """Holds what rows take, beside the weights, gradients and optimizer states: the larger of two phases."""

    phases: tuple[Phase, ...]
    patch_pixels: int

    def peak(self, tokens: int, patches: int) -> int:
        """Return the bytes that a row of this size takes."""
        return max(phase.peak(tokens, patches) for phase in self.phases)

    def times(self, factor: float) -> RowMemory:
        """Return what rows take if everything takes ``factor`` times as much."""
        return self._replace(phases=tuple(phase.times(factor) for phase in self.phases))

    def bound(self, room: int) -> RowBound:
        """Return the bound of rows for which there are ``room`` bytes; rows of single pairs if that is too little."""
        limits = tuple((p.per_token, p.per_patch, max(room - p.fixed, 0)) for p in self.phases)
        return RowBound(SHARES if all(room for *_, room in limits) else 0, limits, self.patch_pixels)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory is out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def free_what_is_left() -> None:
    """Free what a pass that failed has made, which cycles may hold, so that its memory is whole again."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def if_it_fits(call: Callable[[], Result]) -> tuple[Result | None, str]:
    """Return what ``call`` returns; if memory is out, None and why. Nothing of a call that failed is left."""
    try:
        return call(), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    free_what_is_left()  # the error, which holds the call's tensors, is gone here
    return None, reason


# ---- meters ----


class CudaMeter:
    """Tells by how many bytes a CUDA device's memory has grown at most since :meth:`start`, or since :meth:`mark`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0

    def __enter__(self) -> CudaMeter:
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: the allocator counts all the time."""

    def start(self) -> None:
        """Begin: what is allocated now does not count."""
        self.mark()
        self._base = torch.cuda.memory_allocated(self._device)

    def mark(self) -> None:
        """Forget the peak so far; growth still counts from :meth:`start`."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Return the bytes."""
        return int(torch.cuda.max_memory_allocated(self._device)) - self._base


class LiveBytes:
    """Counts the bytes of the tensors that operations in its body make, as long as each is alive.

    Works for tensors on a CPU, and on torch's meta device, which has shapes but no memory. What a kernel takes for
    itself while it runs is not seen.
    """

    def __init__(self) -> None:
        self._live = self._peak = 0
        self._known: set[int] = set()
        self._watching = ExitStack()

    def __enter__(self) -> LiveBytes:
        self._watching.enter_context(compat.watching_operations(self._see))
        return self

    def __exit__(self, *error: object) -> None:
        """Stop counting."""
        self._watching.close()

    def start(self) -> None:
        """Begin: what is allocated now does not count."""
        self._live = self._peak = 0

    def mark(self) -> None:
        """Forget the peak so far; growth still counts from :meth:`start`."""
        self._peak = self._live

    def peak(self) -> int:
        """Return the bytes."""
        return self._peak

    def _see(self, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        old = {id(tensor.untyped_storage()) for tensor in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            key = id(storage)
            if key not in self._known and key not in old:
                self._count(storage, key)

    def _count(self, storage: Any, key: int) -> None:
        size = storage.nbytes()
        self._known.add(key)
        self._live += size
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


Meter = CudaMeter | LiveBytes


def meter_for(device: torch.device) -> Meter:
    """Return the meter for ``device``."""
    return CudaMeter(device) if device.type == "cuda" else LiveBytes()


# ---- measuring ----


def measure_rows(
    read: Read,
    pair: PromptTree,
    *,
    tower: nn.Module | None,
    meter: Meter,
    patch_pixels: int,
    most_pairs: int = _MOST_IN_A_BLOCK,
) -> RowMemory:
    """Read a few rows forward and backward, of text alone and with images; return what rows take.

    They are of one and of two pairs; of more pairs with images where the tower is read in blocks, as a longer row has
    no larger block than one that fills a block does. A row that is out of memory counts as one that takes no more than
    the row before does, in proportion. Gradients must be dropped afterwards.

    Args:
        read: reads trees in one row.
        pair: the largest of some real pairs.
        tower: the vision tower, None if there is none.
        meter: of the device.
        patch_pixels: pixels of a patch of the tower.
        most_pairs: that a row will hold: to fill a block no more are read, and twice as many beside.

    Raises:
        RuntimeError: out of memory in a row of one pair.
    """
    text = _without_images(pair)
    tokens, patches = pair.num_tokens, count_patches(pair, patch_pixels)
    with meter:
        _peaks(read, [pair], None, meter)  # kernels load, and gradients get the memory that they have in a step
        short, _ = _peaks(read, [text], None, meter)
        long, _ = if_it_fits(lambda: _peaks(read, [text] * 2, None, meter))
        per_token = (short if long is None else max(long[0] - short, 0)) // tokens
        before = Phase(max(short - per_token * tokens, 0), per_token, 0)
        if not patches:
            return RowMemory((before,), patch_pixels)
        block = patches_of_a_block(tower, pair.vision, patch_pixels)
        one = _peaks(read, [pair], tower, meter)
        count = max(-(-block // patches), 1)  # pairs that fill a block
        if count > _MOST_IN_A_BLOCK:  # small images of a tower that lists patches: as if it read them all at once
            count = 1
        count = min(count, most_pairs)
        some, _ = if_it_fits(lambda: _peaks(read, [pair] * count, tower, meter)) if count > 1 else (one, "")
        if some is None:
            count, some = 1, one
        two, _ = if_it_fits(lambda: _peaks(read, [pair] * (2 * count), tower, meter))
    there = count * patches
    before = before._replace(per_patch=max(some[0] - before.peak(count * tokens, 0), 0) // there)
    if some[1] is None:  # no gradient goes into the tower: all there is to a pass is its first phase
        return RowMemory((before,), patch_pixels)
    behind = _behind(some[1], None if two is None else two[1], there)
    if count > 1 and block > patches and one[1] is not None:
        behind = _with_block(behind, one[1], patches, block)
    return RowMemory((before, behind), patch_pixels)


def _behind(some: int, twice: int | None, patches: int) -> Phase:
    """Return the phase behind the tower's output, from its peaks with ``patches`` and with twice as many.

    Of the text's part only the gradient of the images' features is left: as much as there are patches.
    """
    per_patch = (some if twice is None else max(twice - some, 0)) // patches
    return Phase(max(some - per_patch * patches, 0), 0, per_patch)


def _with_block(phase: Phase, one: int, patches: int, block: int) -> Phase:
    """Return ``phase``, whose constant holds a block, with the block apart; ``patches`` alone take ``one`` bytes."""
    in_block = max(phase.peak(0, patches) - one, 0) // (block - patches)
    in_block = min(in_block, phase.constant // block)
    return phase._replace(constant=phase.constant - in_block * block, in_block=in_block, block=block)


def _without_images(tree: PromptTree) -> PromptTree:
    """Return a tree of the same lengths, its prompt made of words of its responses."""
    ids = torch.cat(tree.responses)
    ids = ids.repeat(-(-tree.prompt_ids.numel() // ids.numel()))[: tree.prompt_ids.numel()]
    types = {name: torch.zeros_like(marks) for name, marks in tree.token_types.items()}
    return PromptTree(ids, tree.responses, token_types=types)


def _peaks(read: Read, trees: Sequence[PromptTree], tower: nn.Module | None, meter: Meter) -> tuple[int, int | None]:
    """Return the peak until the gradient reaches the tower's output, and the one behind that, both from the start.

    The second is None if no gradient comes there.
    """
    first: list[int] = []

    def reached(_: Tensor) -> None:
        if not first:
            first.append(meter.peak())
            meter.mark()

    def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in compat.tensors_in(dict(output) if isinstance(output, dict) else output):
            if tensor.requires_grad:
                tensor.register_hook(reached)

    handle = None if tower is None else tower.register_forward_hook(watch)
    try:
        meter.start()
        read(trees).backward()
    finally:
        if handle is not None:
            handle.remove()
    last = meter.peak()
    return (first[0], last) if first else (last, None)
