"""Keep ranks in step: before an optimizer step they agree on its denominators, its passes and its errors.

Ranks rarely have equal work: one has fewer pairs, one needs more rows, one has no image. Wrappers that shard weights or
gradients (FSDP2, DeepSpeed) communicate in every layer of every pass, so all ranks must make the same passes through
the same layers. A rank with less to read therefore reads dummy rows, which belong to no pair, and a row without an
image gets a dummy image at its end. Neither is scored, and both add exactly zero to loss and gradients. DDP
communicates only in the last backward pass of a batch, so only its last micro-batch gets a dummy image, and none if
DDP looks for unused weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.records import IMAGE_PLACEHOLDER, Message, PreferencePair
from vlmpo.errors import ModelError, RecordError, RunError, met_by_all
from vlmpo.train.batching import Batch, Collator, MicroBatch, lay_out
from vlmpo.train.data_watch import MEDIA_REASONS
from vlmpo.train.sharding import all_gather_object, passes_are_shared
from vlmpo.tree.dummies import append_dummy, dummy_row
from vlmpo.tree.layout import PromptTree

_VIDEO_TENSORS = "pixel_values_videos"


@dataclass(frozen=True)
class StepInfo:
    """Describes what one rank, or all of them, will read in an optimizer step.

    Attributes:
        pairs, chosen_tokens: the denominators; of all ranks: the sums.
        micro_batches: for each batch its number of micro-batches with rows; of all ranks: the largest.
        records: pairs and records that cannot be used.
        failed: of the latter, those whose media or data file cannot be read any more.
        images, videos: whether any row has some.
        error: of a bad record that ends the run, if there is one.
        signum: the signal after which the run is to end, 0 if none has come; of all ranks: of any of them.
    """

    pairs: int
    chosen_tokens: int
    micro_batches: tuple[int, ...]
    images: bool
    videos: bool
    error: RecordError | None = None
    records: int = 0
    failed: int = 0
    signum: int = 0

    @classmethod
    def of(cls, batches: Sequence[Batch], error: RecordError | None = None, signum: int = 0) -> StepInfo:
        """Describe this rank's part in an optimizer step."""
        rows = [row for batch in batches for micro_batch in batch.micro_batches for row in micro_batch.rows]
        dropped = [unusable for batch in batches for unusable in batch.dropped]
        pairs = sum(len(batch) for batch in batches)
        return cls(
            pairs=pairs,
            chosen_tokens=sum(batch.num_chosen_tokens for batch in batches),
            micro_batches=tuple(sum(bool(part.rows) for part in batch.micro_batches) for batch in batches),
            images=any(row.vision for row in rows),
            videos=any(_VIDEO_TENSORS in row.vision for row in rows),
            error=error,
            records=pairs + len(dropped),
            failed=sum(unusable.error.reason in MEDIA_REASONS for unusable in dropped),
            signum=signum,
        )

    @classmethod
    def merge(cls, ranks: Sequence[StepInfo]) -> StepInfo:
        """Describe the step of all ranks. The sampler gives each rank the same number of batches a step."""
        return cls(
            pairs=sum(info.pairs for info in ranks),
            chosen_tokens=sum(info.chosen_tokens for info in ranks),
            micro_batches=tuple(max(counts) for counts in zip(*(info.micro_batches for info in ranks), strict=True)),
            images=any(info.images for info in ranks),
            videos=any(info.videos for info in ranks),
            error=next((info.error for info in ranks if info.error is not None), None),
            records=sum(info.records for info in ranks),
            failed=sum(info.failed for info in ranks),
            signum=max(info.signum for info in ranks),
        )


class RankSync:
    """Runs the collectives of a run, and makes the dummies that keep this rank in step with the others.

    Args:
        accelerator: of the run.
        encoder: of the run; it makes the dummy rows too.
        collator: of the run; its ``shared`` is whether rows share prompts, which may change at the start of training.
    """

    def __init__(self, accelerator: Any, encoder: PairEncoder, collator: Collator) -> None:
        self.accelerator = accelerator
        self.encoder = encoder
        self.collator = collator
        self._dummy_trees: dict[bool, PromptTree] = {}
        self._only_dummy_images = False  # in the step under way

    # ---- collectives ----

    @property
    def share_passes(self) -> bool:
        """Whether every pass of a rank needs the other ranks; see :func:`passes_are_shared`."""
        return passes_are_shared(self.accelerator)

    def all_gather(self, value: Any) -> list[Any]:
        """Return the ``value`` of every rank, any object, in order of the ranks."""
        return all_gather_object(self.accelerator, value)

    def sum_over_ranks(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sum each value over ranks, in float64 if the device has it."""
        if self.accelerator.num_processes == 1:
            return [float(value) for value in values]
        kind = torch.float32 if device.type == "mps" else torch.float64
        summed = self.accelerator.reduce(torch.tensor(values, dtype=kind, device=device), reduction="sum")
        return [float(value) for value in summed]

    def all_reduce(self, batches: Sequence[Batch], error: RecordError | None = None, signum: int = 0) -> StepInfo:
        """Return what all ranks will read in the step of ``batches``; called before any forward.

        ``signum`` is a signal that has come to this rank.

        Raises:
            RecordError: some rank gave an ``error``; all of them raise it.
            RunError: videos under a wrapper that shares every pass.
        """
        info = StepInfo.merge(self.all_gather(StepInfo.of(batches, error, signum)))
        if info.error is not None:
            raise met_by_all(info.error)
        if info.videos and self.share_passes:
            raise met_by_all(
                RunError(
                    "videos cannot be trained on under FSDP or DeepSpeed: ranks with and without one would wait for "
                    "each other for ever; use DDP (leave training.fsdp and training.deepspeed out)"
                )
            )
        return info

    def in_step(self, batches: Iterable[Batch], model: nn.Module, fail_on_bad: bool) -> Iterator[Batch]:
        """Yield each batch with the dummies it needs, once all ranks have one, to score it outside of a training step.

        Raises:
            RecordError: ``fail_on_bad``, and some rank met a bad record; all of them raise it.
        """
        for batch in batches:
            error = batch.dropped[0].error if fail_on_bad and batch.dropped else None
            yield self.add_dummies([batch], self.all_reduce([batch], error), model)[0]

    # ---- dummies ----

    def add_dummies(self, batches: Sequence[Batch], info: StepInfo, model: nn.Module) -> list[Batch]:
        """Return ``batches`` with the dummies that this rank needs to run ``model``, the wrapped policy, in step."""
        reads_images = getattr(self.encoder.processor, "image_processor", None) is not None
        if self.share_passes and self.accelerator.num_processes > 1:
            # ZeRO-3 would step with an earlier step's gradient for weights that get none in this one.
            images = info.images or (reads_images and self.accelerator.distributed_type == DistributedType.DEEPSPEED)
            counts, last_only = info.micro_batches, False
        elif torch.is_grad_enabled():
            # Every weight must take part in every shared backward pass, whichever rank has images, unless DDP looks
            # for unused weights; and there must be a backward pass.
            strict = isinstance(model, DistributedDataParallel) and not model.find_unused_parameters
            images = strict and reads_images
            self._only_dummy_images = images and not info.images
            counts, last_only = (1,) * len(batches), True
        else:
            return list(batches)
        return [self._complete(batch, count, images, last_only) for batch, count in zip(batches, counts, strict=True)]

    def _complete(self, batch: Batch, count: int, images: bool, last_only: bool) -> Batch:
        """Fill ``batch`` up to ``count`` (at least 1) micro-batches; ``images``: with images in all or in the last."""
        parts = [part for part in batch.micro_batches if part.rows]
        parts += [self._dummy_micro_batch(images)] * (max(1, count) - len(parts))
        if images:
            for at in (-1,) if last_only else range(len(parts)):
                rows = [row if row.vision else append_dummy(row, self.dummy_tree(True)) for row in parts[at].rows]
                parts[at] = replace(parts[at], rows=rows)
        return replace(batch, micro_batches=parts)

    def drop_dummy_gradients(self, model: nn.Module) -> None:
        """Set the vision tower's summed gradients from 0 to None if no rank had an image in the step.

        An optimizer with momentum or weight decay moves weights whose gradient is 0.
        """
        if not self._only_dummy_images:
            return
        for parameter in model.parameters():
            if parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None

    def _dummy_micro_batch(self, images: bool) -> MicroBatch:
        """Make a micro-batch without pairs: one row, or two if each response of a pair is read in a row of its own."""
        count = 2 if self.encoder.need_rejected and not self.collator.shared else 1
        return replace(lay_out([]), rows=[dummy_row(self.dummy_tree(images))] * count)

    def dummy_tree(self, image: bool) -> PromptTree:
        """Return a short prompt, with one small blank image or none, and a response of one token."""
        if image not in self._dummy_trees:
            encoder = copy.copy(self.encoder)
            encoder.max_length, encoder.need_rejected = None, False
            dummy = PreferencePair(
                prompt=(Message("user", f"{IMAGE_PLACEHOLDER}\nA" if image else "A"),),
                images=(Image.new("RGB", (64, 64), (128, 128, 128)),) if image else (),
                chosen="A",
                rejected=None,
                max_tiles=1,
            )
            try:
                pair = encoder.encode(dummy)
            except RecordError as error:
                raise ModelError(
                    f"the model's processor refuses the dummy prompt that keeps ranks in step: {error.detail}"
                ) from error
            response = pair.chosen_ids[:1]
            self._dummy_trees[image] = PromptTree(pair.prompt_ids, (response,), pair.vision, pair.token_types)
        return self._dummy_trees[image]
