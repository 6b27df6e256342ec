"""Ranks in step: before an optimizer step they agree on its denominators, on how much each will read, and on errors.

Ranks rarely have equal work: one has fewer pairs, one needs more rows, one has no image. Wrappers that shard weights or
gradients (FSDP2, DeepSpeed) talk to the other ranks in every layer of every pass, so there each rank must make the same
passes through the same layers: a rank with less to read reads idle rows, which belong to no pair, and a row without an
image is given one behind its end. Neither is scored; what they add to loss and gradients is exactly zero. Under DDP
only the last backward pass of a micro-batch is shared: it alone is so completed, where DDP does not look for weights
that were left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from accelerate.utils import DistributedType
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.records import IMAGE_PLACEHOLDER, Message, PreferencePair
from vlmpo.errors import ModelError, RecordError, RunError, VlmpoError
from vlmpo.train.batching import Batch, MicroBatch, lay_out
from vlmpo.train.sharding import all_gather_object, passes_are_shared
from vlmpo.tree.dummies import append_dummy, dummy_row
from vlmpo.tree.layout import PackedRow, PromptTree

_VIDEO_TENSORS = "pixel_values_videos"


@dataclass(frozen=True)
class StepInfo:
    """What one rank, or all of them, will read in an optimizer step.

    Attributes:
        pairs, chosen_tokens: the denominators; summed over ranks.
        parts: how many parts each micro-batch has; the most of any rank.
        images, videos: whether any row has some.
        error: of a record, where the run is to end on it.
    """

    pairs: int
    chosen_tokens: int
    parts: tuple[int, ...]
    images: bool
    videos: bool
    error: RecordError | None = None


def step_info(batches: Sequence[Batch], error: RecordError | None = None) -> StepInfo:
    """This rank's part in an optimizer step of the micro-batches ``batches``."""
    rows = [row for batch in batches for part in batch.parts for row in part.rows]
    return StepInfo(
        pairs=sum(len(batch) for batch in batches),
        chosen_tokens=sum(batch.num_chosen_tokens for batch in batches),
        parts=tuple(sum(bool(part.rows) for part in batch.parts) for batch in batches),
        images=any(row.vision for row in rows),
        videos=any(_VIDEO_TENSORS in row.vision for row in rows),
        error=error,
    )


def merge_step_info(works: Sequence[StepInfo]) -> StepInfo:
    """The work of all ranks as one. Ranks have equally many micro-batches a step: the sampler sees to it."""
    return StepInfo(
        pairs=sum(work.pairs for work in works),
        chosen_tokens=sum(work.chosen_tokens for work in works),
        parts=tuple(max(counts) for counts in zip(*(work.parts for work in works), strict=True)),
        images=any(work.images for work in works),
        videos=any(work.videos for work in works),
        error=next((work.error for work in works if work.error is not None), None),
    )


class _Collation(Protocol):
    shared: bool


class RankSync:
    """Keeps this rank in step with the others.

    Args:
        accelerator: of the run.
        encoder: of the run; idle rows are made by the model's own processor.
        collation: knows whether rows share prompts.
    """

    def __init__(self, accelerator: Any, encoder: PairEncoder, collation: _Collation) -> None:
        self.accelerator = accelerator
        self.encoder = encoder
        self.collation = collation
        self._dummy_trees: dict[bool, PromptTree] = {}
        self._only_dummy_images = False  # in the step under way

    def agree(self, batches: Sequence[Batch], error: RecordError | None = None) -> StepInfo:
        """The work of all ranks in the step of ``batches``, known to each of them before any forward.

        Raises:
            RecordError: some rank met an error; all of them raise it.
            RunError: videos under a wrapper that shares every pass.
        """
        work = merge_step_info(all_gather_object(self.accelerator, step_info(batches, error)))
        if work.error is not None:
            raise self.everywhere(work.error)
        if work.videos and passes_are_shared(self.accelerator):
            raise self.everywhere(
                RunError(
                    "videos cannot be trained on under FSDP or DeepSpeed: ranks with and without one would wait for "
                    "each other for ever; use DDP (leave training.fsdp and training.deepspeed out)"
                )
            )
        return work

    def everywhere(self, error: VlmpoError) -> VlmpoError:
        """Mark an error that all ranks raise: one message is enough."""
        error.met_by = "all"
        return error

    def level(self, batches: Sequence[Batch], work: StepInfo, model: nn.Module) -> list[Batch]:
        """``batches`` with whatever idle reading ``model``, as it is wrapped, needs of this rank."""
        reads_images = getattr(self.encoder.processor, "image_processor", None) is not None
        if passes_are_shared(self.accelerator) and self.accelerator.num_processes > 1:
            # ZeRO-3 would step with an earlier gradient of weights that have none.
            images = work.images or (reads_images and self.accelerator.distributed_type == DistributedType.DEEPSPEED)
            counts, last_only = work.parts, False
        elif torch.is_grad_enabled():
            # Every weight must come into every shared backward pass, whoever has images, unless DDP looks for those
            # that did not; and there must be a backward pass.
            strict = isinstance(model, DistributedDataParallel) and not model.find_unused_parameters
            images = strict and reads_images
            self._only_dummy_images = images and not work.images
            counts, last_only = (1,) * len(batches), True
        else:
            return list(batches)
        return [
            replace(batch, parts=self._level(batch.parts, count, images, last_only))
            for batch, count in zip(batches, counts, strict=True)
        ]

    def _level(self, parts: Sequence[MicroBatch], count: int, images: bool, last_only: bool) -> list[MicroBatch]:
        own = [part for part in parts if part.rows]
        level = own + [self._dummy_micro_batch(images)] * (max(1, count) - len(own))
        if images:
            for at in (-1,) if last_only else range(len(level)):
                level[at] = replace(level[at], rows=[self._with_image(row) for row in level[at].rows])
        return level

    def drop_dummy_gradients(self, model: nn.Module) -> None:
        """Once gradients are summed: where no rank had an image, the tower's are none, not 0.

        To an optimizer with momentum or weight decay the two are not the same.
        """
        if not self._only_dummy_images:
            return
        for parameter in model.parameters():
            if parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None

    def _dummy_micro_batch(self, images: bool) -> MicroBatch:
        """A part of no pair, with as many rows as any other part has."""
        rows = 2 if self.encoder.need_rejected and not self.collation.shared else 1
        return replace(lay_out([]), rows=[dummy_row([self._dummy_tree(images)])] * rows)

    def _with_image(self, row: PackedRow) -> PackedRow:
        return row if row.vision else append_dummy(row, self._dummy_tree(True))

    def _dummy_tree(self, image: bool) -> PromptTree:
        if image not in self._dummy_trees:
            pair = self._dummy_pair(image)
            self._dummy_trees[image] = PromptTree(
                pair.prompt_ids, (pair.chosen_ids[:1],), pair.vision, pair.token_types
            )
        return self._dummy_trees[image]

    def _dummy_pair(self, image: bool) -> EncodedPair:
        """A short prompt, with one small blank image or none, as this model's processor encodes it."""
        encoder = copy.copy(self.encoder)
        encoder.max_length, encoder.need_rejected = None, False
        pair = PreferencePair(
            prompt=(Message("user", f"{IMAGE_PLACEHOLDER}\nA" if image else "A"),),
            images=(Image.new("RGB", (64, 64), (128, 128, 128)),) if image else (),
            chosen="A",
            rejected=None,
            max_tiles=1,
        )
        try:
            return encoder.encode(pair)
        except RecordError as error:
            raise ModelError(
                f"the model's processor refuses the idle prompt that keeps ranks in step: {error.detail}"
            ) from error


class AtTrainBegin(TrainerCallback):
    """Calls ``check`` once, when the model is wrapped and the first step still to come."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check: Callable[[], None] | None = check

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is wrapped by now."""
        check, self._check = self._check, None
        if check is not None:
            check()
