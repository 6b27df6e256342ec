"""Make the loaders of a run, whose workers encode and collate the pairs of each batch."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from vlmpo.data.encode.encoder import EncodedPairs, PairEncoder
from vlmpo.errors import RecipeError
from vlmpo.interrupt import ignore_in_worker
from vlmpo.log import logger
from vlmpo.train.batching import Collator
from vlmpo.train.config import MPOConfig
from vlmpo.train.lengths import count_patch_pixels, estimate_lengths, measure_tokens_per_patch, pair_costs
from vlmpo.train.sampler import (
    PairBatchSampler,
    PairCosts,
    PairLoader,
    explain_small_micro_batch,
    prompt_keys,
)

_STEPS_SHOWN = 100  # over which the balance of ranks is averaged for the log


class LoaderFactory:
    """Makes the loaders of a run.

    Args:
        args: MPOConfig of the run.
        encoder: encodes pairs as the model reads them.
        loader_encoder: does the same in the loaders' workers.
        collator: turns encoded pairs into batches.
        accelerator: of the run.
        model: the policy, whose size decides what a pair costs.
    """

    def __init__(
        self,
        args: MPOConfig,
        *,
        encoder: PairEncoder,
        loader_encoder: PairEncoder,
        collator: Collator,
        accelerator: Any,
        model: Any,
    ) -> None:
        self.args = args
        self.encoder = encoder
        self.loader_encoder = loader_encoder
        self.collator = collator
        self.accelerator = accelerator
        self.model = model
        self._prompt_keys: list[bytes] | None = None  # of the training pairs, once they are needed
        self._costs: PairCosts | None = None  # of the training pairs, likewise

    def check_steps(self, num_pairs: int, per_device: int) -> None:
        """Raise RecipeError if ``dataloader_drop_last`` leaves no step; log a note if groups of pairs are cut up."""
        args = self.args
        step = per_device * args.gradient_accumulation_steps * self.accelerator.num_processes
        if args.dataloader_drop_last and num_pairs < step:
            raise RecipeError(
                f"training.dataloader_drop_last: leaves out all {num_pairs} pairs, as a step takes {step}; set it to "
                "false, or lower per_device_train_batch_size or gradient_accumulation_steps"
            )
        remark = explain_small_micro_batch(args.group_by_prompt, per_device)
        if remark is not None:
            logger.info(f"note: {remark}")

    def training(self, pairs: Any, per_device: int, drop_last: bool) -> PairLoader:
        """Make the loader of training pairs, in an order that depends on seed and epoch alone.

        Args:
            pairs: the data set.
            per_device: pairs of a batch.
            drop_last: leave out the last optimizer step of an epoch if it is not full.
        """
        args = self.args
        seed: int | None = args.data_seed if args.data_seed is not None else args.seed
        if args.train_sampling_strategy == "sequential":
            seed = None
        if args.group_by_prompt > 1 and seed is not None and self._prompt_keys is None:
            self._prompt_keys = prompt_keys(pairs)
        # Balanced ranks read their costliest pairs first: a delta that moves with every micro-batch would follow the
        # length of the responses.
        delta_moves = args.reward_shift == "running" and self.encoder.need_rejected
        balance = args.balance_ranks and self.accelerator.num_processes > 1 and seed is not None and not delta_moves
        first_time = balance and self._costs is None
        if first_time:
            lengths = estimate_lengths(
                pairs, encoder=self.encoder, patch_pixels=count_patch_pixels(self.model), accelerator=self.accelerator
            )
            self._costs = pair_costs(
                lengths,
                tokens_per_patch=measure_tokens_per_patch(self.model),
                num_responses=2 if self.encoder.need_rejected else 1,
                shared=self.collator.shared,
            )
        loader = self._loader(
            pairs,
            per_device=per_device,
            accumulation=args.gradient_accumulation_steps,
            seed=seed,
            drop_last=drop_last,
            keys=self._prompt_keys,
            max_group=args.group_by_prompt,
            costs=self._costs,
        )
        loader.last_epoch = math.ceil(args.num_train_epochs) - 1 if args.max_steps <= 0 else sys.maxsize
        if first_time:
            balanced, dealt = (loader.pair_sampler.mean_imbalance(_STEPS_SHOWN, way) for way in (True, False))
            figures = f"{balanced:.2f} times the mean work of a step ({dealt:.2f} in plain order)"
            logger.info(f"ranks: the heaviest has {figures}, by tokens and patches")
        return loader

    def evaluation(self, pairs: Any) -> PairLoader:
        """Make the loader of pairs in the data set's own order."""
        return self._loader(pairs, per_device=self.args.eval_batch_size)

    def _loader(self, pairs: Any, **order: Any) -> PairLoader:
        num_workers = self.args.dataloader_num_workers or 0
        return PairLoader(
            EncodedPairs(pairs, self.loader_encoder),
            batch_sampler=PairBatchSampler(
                num_pairs=len(pairs),
                num_ranks=self.accelerator.num_processes,
                rank=self.accelerator.process_index,
                **order,
            ),
            collate_fn=self.collator,
            num_workers=num_workers,
            worker_init_fn=ignore_in_worker,
            generator=torch.Generator(),  # its own: reading data must not change the random state of training
            persistent_workers=self.args.dataloader_persistent_workers and num_workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if num_workers else None,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )
