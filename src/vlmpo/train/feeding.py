"""The part of the trainer that fetches pairs: micro-batches in their order, and what became of every pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vlmpo import compat
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.errors import RecipeError, RecordError
from vlmpo.log import logger
from vlmpo.train.balance import PairCosts
from vlmpo.train.batching import Batch, Collator, EncodedPairs, PairBatchSampler, PairLoader
from vlmpo.train.choices import ChoosingTrainer
from vlmpo.train.cost import costs_of, patch_pixels, sizes_of_all, tokens_per_patch
from vlmpo.train.counts import PairCounts
from vlmpo.train.order import prompt_labels, room_for_groups
from vlmpo.train.progress import StepClock
from vlmpo.train.rank_sync import RankSync

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
            self._labels = prompt_labels(self.train_dataset)
        told = self._costs is not None
        if self._shares_evenly(order) and self._costs is None:
            self._costs = self._costs_of_pairs()
        loader = self._loader(
            self.train_dataset,
            *(compat.batch_size_per_device(self), accumulation, order, drop_last, self._labels, group, self._costs),
        )
        lags = None if told else loader.sampler_of_pairs.lags(_TOLD_STEPS)
        if lags is not None:
            figures = "{:.2f} times the mean work of a step ({:.2f} in plain order)".format(*lags)
            logger.info(f"ranks: the heaviest has {figures}, by tokens and patches")
        return loader

    def check_steps(self) -> None:
        """Refuse to train where no step would be taken; say where a micro-batch has no room for a group of pairs.

        Raises:
            RecipeError: under ``dataloader_drop_last`` all pairs together are less than a step.
        """
        if self.train_dataset is None:
            return
        per_device, count = compat.batch_size_per_device(self), len(self.train_dataset)
        whole = per_device * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if self.args.dataloader_drop_last and count < whole:
            raise RecipeError(
                f"training.dataloader_drop_last: leaves out all {count} pairs, as a step takes {whole}; set it to "
                "false, or lower per_device_train_batch_size or gradient_accumulation_steps"
            )
        remark = room_for_groups(self.args.group_by_prompt, per_device)
        if remark is not None:
            logger.info(f"note: {remark}")

    def _shares_evenly(self, order: int | None) -> bool:
        """Whether ranks get equal work; not where the data set's own order is asked for.

        Nor where delta moves with every micro-batch: the heaviest first would let it follow the length of responses.
        """
        moves = self.args.reward_shift == "running" and self.encoder.need_rejected
        return self.args.balance_ranks and self.accelerator.num_processes > 1 and order is not None and not moves

    def _costs_of_pairs(self) -> PairCosts:
        sizes = sizes_of_all(self.accelerator, self.train_dataset, self.encoder, patch_pixels(self.model))
        responses = 2 if self.encoder.need_rejected else 1
        return costs_of(sizes, tokens_per_patch(self.model), responses, self.data_collator.shared)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PairLoader:
        """Micro-batches of this rank, in the data set's own order."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):
            data = self.eval_dataset[data]
        return self._loader(data, self.args.eval_batch_size, 1, None, False)

    def _loader(self, data: Any, per_device: int, *order: Any) -> PairLoader:
        """Of pairs in the order that PairBatchSampler's further arguments say."""
        accumulation, seed, drop_last, *grouping = order
        ranks = (self.accelerator.num_processes, self.accelerator.process_index)
        workers = self.args.dataloader_num_workers
        return PairLoader(
            EncodedPairs(data, self.loader_encoder),
            batch_sampler=PairBatchSampler(len(data), per_device, accumulation, *ranks, seed, drop_last, *grouping),
            collate_fn=self.data_collator,
            num_workers=workers,
            generator=torch.Generator(),  # its own: reading data must not move the random state of training
            persistent_workers=bool(workers) and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
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
            if self.pair_counts.is_news(unusable.error):
                logger.info(f"dropped: {unusable.error}")
        if (self.state.epoch or 0.0) < 1.0:  # every pair comes once an epoch: the first one counts them
            self.pair_counts.add(batches)
        return None
