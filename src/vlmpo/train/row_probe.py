"""Read a real pair's rows with the model of a run, before its first step, to see what they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmpo import compat
from vlmpo.data.encode.encoder import EncodedPair, EncodedPairs
from vlmpo.models.mode import in_mode
from vlmpo.train.batching import MicroBatch, lay_out, tree_of
from vlmpo.train.lengths import count_patch_pixels
from vlmpo.train.memory import RowMemory, measure_rows, meter_for
from vlmpo.train.memory_choice import spread
from vlmpo.train.sharding import no_gradient_sync
from vlmpo.tree.forward import response_logps, response_logps_and_router_losses
from vlmpo.tree.layout import PromptTree, rows_of
from vlmpo.tree.packing import count_patches
from vlmpo.tree.vision_blocks import can_read_in_blocks, read_in_blocks, vision_tower_of


class RowProbe:
    """Measures rows of the largest of a few pairs.

    Args:
        pairs: the training pairs.
        policy: the model, under no wrapper.
        wrapped: as training calls it.
        shared: whether rows share prompts.
        with_router: whether the loss of routers is read too.
        prepare: moves a micro-batch to the device.
        pairs_at_once: pairs of a micro-batch.
        accelerator: of the run.
    """

    def __init__(
        self,
        pairs: EncodedPairs,
        *,
        policy: Any,
        wrapped: nn.Module,
        shared: bool,
        with_router: bool,
        prepare: Callable[[MicroBatch], MicroBatch],
        pairs_at_once: int,
        accelerator: Any,
    ) -> None:
        self._pairs = pairs
        self._policy = policy
        self._wrapped = wrapped
        self._shared = shared
        self._with_router = with_router
        self._prepare = prepare
        self._pairs_at_once = pairs_at_once
        self._accelerator = accelerator
        self._patch_pixels = count_patch_pixels(policy)
        self._tree: PromptTree | None = None

    @property
    def weights(self) -> int:
        """Bytes of the model's weights."""
        return sum(parameter.nbytes for parameter in self._policy.parameters())

    def largest(self) -> tuple[int, int]:
        """Return tokens and patches of the largest pair."""
        tree = self._largest()
        return tree.num_tokens, count_patches(tree, self._patch_pixels)

    def _largest(self) -> PromptTree:
        if self._tree is None:
            items = [self._pairs[index] for index in spread(len(self._pairs))]
            found = [tree_of(item) for item in items if isinstance(item, EncodedPair)]
            if not found:  # the start check has found one
                every = (self._pairs[index] for index in range(len(self._pairs)))
                found = [tree_of(next(item for item in every if isinstance(item, EncodedPair)))]
            self._tree = max(found, key=lambda t: t.num_tokens + count_patches(t, self._patch_pixels))
        return self._tree

    def measure(self, recompute: bool) -> RowMemory:
        """Return what rows take, with the vision tower in blocks of tiles or not; leaves no gradient behind.

        Raises:
            RuntimeError: not even one pair fits.
        """
        if can_read_in_blocks(self._policy):
            read_in_blocks(self._policy, recompute)
        running = [  # statistics of batch norms, which a pass in training would move
            (buffer, buffer.clone())
            for module in self._policy.modules()
            if compat.is_batch_norm(module)
            for buffer in module.buffers(recurse=False)
        ]
        device = self._accelerator.device
        masters = self._policy._vlmpo.masters
        kept = nullcontext() if masters is None else masters.kept_for_backward()
        try:
            with no_gradient_sync(self._accelerator, self._wrapped), kept, in_mode(self._wrapped, training=True):
                return measure_rows(
                    self._read,
                    self._largest(),
                    tower=vision_tower_of(self._policy),
                    meter=meter_for(device),
                    patch_pixels=self._patch_pixels,
                    most_pairs=self._pairs_at_once,
                )
        finally:
            for buffer, before in running:
                buffer.copy_(before)
            for parameter in self._wrapped.parameters():
                parameter.grad = None
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _read(self, trees: Sequence[PromptTree]) -> Tensor:
        rows = self._prepare(replace(lay_out([]), rows=rows_of(trees, self._shared))).rows
        if self._with_router:
            return torch.cat(response_logps_and_router_losses(self._wrapped, rows)).sum()
        return response_logps(self._wrapped, rows).sum()
