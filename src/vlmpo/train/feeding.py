"""The part of the trainer that fetches pairs: micro-batches in their order, and what became of every pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.errors import RecipeError, RecordError
from vlmpo.log import logger
from vlmpo.train.batching import Batch, Collator, EncodedPairs
from vlmpo.train.choices import ChoosingTrainer
from vlmpo.train.counts import PairCounts
from vlmpo.train.lengths import count_patch_pixels, estimate_lengths, measure_tokens_per_patch, pair_costs
from vlmpo.train.progress import StepClock
from vlmpo.train.rank_sync import RankSync
from vlmpo.train.sampler import (
    PairBatchSampler,
    PairCosts,
    PairLoader,
    explain_small_micro_batch,
    make_loader,
    prompt_keys,
)

_TOLD_STEPS = 100


class FeedingTrainer(ChoosingTrainer):
    """transformers' Trainer fed with pairs in vlmpo's own order; accelerate's sharding of batches has no part in it.

    Attributes:
        encoder: pairs to tokens and vision tensors, as the model reads them.
        loader_encoder: the same for the loader's workers, whose pixels are normalised on the device.
        data_collator: encoded pairs to micro-batches.
        clock: of optimizer steps.
        pair_counts: what became of the pairs of the first epoch so far, on this rank.
        rank_sync: keeps ranks in step.
    """

    encoder: PairEncoder
    loader_encoder: PairEncoder
    data_collator: Collator
    clock: StepClock
    pair_counts: PairCounts
    rank_sync: RankSync
    _labels: list[bytes] | None = None  # of the training pairs' prompts, once they are asked for
    _costs: PairCosts | None = None  # of the training pairs, likewise

    def get_train_dataloader(self) -> PairLoader:
        """Micro-batches of this rank, in an order that depends on seed and epoch alone."""
        return self.loader_of_training(self.args.dataloader_drop_last)

    def loader_of_training(self, drop_last: bool) -> PairLoader:
        """The same, the last step of an epoch left out or not where it is not full."""
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        order = None if self.args.train_sampling_strategy == "sequential" else seed
        accumulation, group = self.args.gradient_accumulation_steps, self.args.group_by_prompt
        if group > 1 and order is not None and self._labels is None:
            self._labels = prompt_keys(self.train_dataset)
        told = self._costs is not None
        if self._shares_evenly(order) and self._costs is None:
            self._costs = self._costs_of_pairs()
        loader = self._loader(
            self.train_dataset,
            per_device=self._train_batch_size,
            accumulation=accumulation,
            seed=order,
            drop_last=drop_last,
            keys=self._labels,
            max_group=group,
            costs=self._costs,
        )
        if self._costs is not None and not told:
            balanced, plain = (loader.pair_sampler.mean_imbalance(_TOLD_STEPS, way) for way in (True, False))
            figures = f"{balanced:.2f} times the mean work of a step ({plain:.2f} in plain order)"
            logger.info(f"ranks: the heaviest has {figures}, by tokens and patches")
        return loader

    def check_steps(self) -> None:
        """Refuse to train where no step would be taken; say where a micro-batch has no room for a group of pairs.

        Raises:
            RecipeError: under ``dataloader_drop_last`` all pairs together are less than a step.
        """
        if self.train_dataset is None:
            return
        per_device, count = self._train_batch_size, len(self.train_dataset)
        whole = per_device * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if self.args.dataloader_drop_last and count < whole:
            raise RecipeError(
                f"training.dataloader_drop_last: leaves out all {count} pairs, as a step takes {whole}; set it to "
                "false, or lower per_device_train_batch_size or gradient_accumulation_steps"
            )
        remark = explain_small_micro_batch(self.args.group_by_prompt, per_device)
        if remark is not None:
            logger.info(f"note: {remark}")

    def _shares_evenly(self, order: int | None) -> bool:
        """Whether ranks get equal work; not where the data set's own order is asked for.

        Nor where delta moves with every micro-batch: the heaviest first would let it follow the length of responses.
        """
        moves = self.args.reward_shift == "running" and self.encoder.need_rejected
        return self.args.balance_ranks and self.accelerator.num_processes > 1 and order is not None and not moves

    def _costs_of_pairs(self) -> PairCosts:
        return pair_costs(
            estimate_lengths(
                self.train_dataset,
                encoder=self.encoder,
                patch_pixels=count_patch_pixels(self.model),
                accelerator=self.accelerator,
            ),
            tokens_per_patch=measure_tokens_per_patch(self.model),
            num_responses=2 if self.encoder.need_rejected else 1,
            shared=self.data_collator.shared,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PairLoader:
        """Micro-batches of this rank, in the data set's own order."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):
            data = self.eval_dataset[data]
        return self._loader(data, per_device=self.args.eval_batch_size)

    def _loader(self, data: Any, **order: Any) -> PairLoader:
        """Of pairs in the order that PairBatchSampler's further arguments say."""
        return make_loader(
            EncodedPairs(data, self.loader_encoder),
            sampler=PairBatchSampler(
                num_pairs=len(data),
                num_ranks=self.accelerator.num_processes,
                rank=self.accelerator.process_index,
                **order,
            ),
            collate=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], dict[str, float]]:
        """The micro-batches of one optimizer step and its denominators, summed over ranks before any forward."""
        self.clock.start()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.clock.fetched()
        work = self.rank_sync.agree(batches, self._account(batches))
        counts = {"pairs": float(work.pairs), "chosen_tokens": float(work.chosen_tokens)}
        return self.rank_sync.level(batches, work, self.model_wrapped), counts

    def _account(self, batches: list[Batch]) -> RecordError | None:
        """Count what became of the pairs; the error of a bad record where that is to end the run."""
        for unusable in (unusable for batch in batches for unusable in batch.dropped):
            if self.args.on_bad_record == "fail":
                return unusable.error
            if self.pair_counts.add_example(unusable.error.reason, str(unusable.error)):
                logger.info(f"dropped: {unusable.error}")
        if (self.state.epoch or 0.0) < 1.0:  # every pair comes once an epoch: the first one counts them
            for batch in batches:
                self.pair_counts.used.update(source for part in batch.parts for source in part.sources)
                for unusable in batch.dropped:
                    self.pair_counts.drop(unusable.source, unusable.error)
        return None
