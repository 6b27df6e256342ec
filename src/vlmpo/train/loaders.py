"""The loaders of a run: which pairs come when, on which rank, encoded and collated by workers."""

from __future__ import annotations

from typing import Any

import torch

from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.errors import RecipeError
from vlmpo.log import logger
from vlmpo.train.balance import PairCosts
from vlmpo.train.batching import Collator, EncodedPairs
from vlmpo.train.config import MPOConfig
from vlmpo.train.cost import costs_of, patch_pixels, sizes_of_all, tokens_per_patch
from vlmpo.train.order import prompt_labels, room_for_groups
from vlmpo.train.sampler import PairBatchSampler, PairLoader

_STEPS_SHOWN = 100  # of an epoch, when the balance of ranks is said


class LoaderFactory:
    """Makes the loaders of a run.

    Args:
        args: MPOConfig of the run.
        encoder: encodes pairs as the model reads them.
        loader_encoder: does the same in the loaders' workers.
        collator: turns encoded pairs into batches.
        accelerator: of the run.
        model: the policy: what reading a pair costs depends on it.
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
        self._labels: list[bytes] | None = None  # of the training pairs' prompts, once they are needed
        self._costs: PairCosts | None = None  # of the training pairs, likewise

    def check_steps(self, num_pairs: int, per_device: int) -> None:
        """Raise RecipeError if ``dataloader_drop_last`` leaves no step; say if a group of pairs has no room."""
        args = self.args
        step = per_device * args.gradient_accumulation_steps * self.accelerator.num_processes
        if args.dataloader_drop_last and num_pairs < step:
            raise RecipeError(
                f"training.dataloader_drop_last: leaves out all {num_pairs} pairs, as a step takes {step}; set it to "
                "false, or lower per_device_train_batch_size or gradient_accumulation_steps"
            )
        remark = room_for_groups(args.group_by_prompt, per_device)
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
        if args.group_by_prompt > 1 and seed is not None and self._labels is None:
            self._labels = prompt_labels(pairs)
        # The heaviest pairs come first: delta that moves with every micro-batch would follow the length of responses.
        delta_moves = args.reward_shift == "running" and self.encoder.need_rejected
        balance = args.balance_ranks and self.accelerator.num_processes > 1 and seed is not None and not delta_moves
        first_time = balance and self._costs is None
        if first_time:
            sizes = sizes_of_all(self.accelerator, pairs, self.encoder, patch_pixels(self.model))
            responses = 2 if self.encoder.need_rejected else 1
            self._costs = costs_of(sizes, tokens_per_patch(self.model), responses, self.collator.shared)
        loader = self._loader(
            pairs,
            per_device=per_device,
            accumulation=args.gradient_accumulation_steps,
            seed=seed,
            drop_last=drop_last,
            labels=self._labels,
            group=args.group_by_prompt,
            costs=self._costs,
        )
        lags = loader.sampler_of_pairs.lags(_STEPS_SHOWN) if first_time else None
        if lags is not None:
            figures = "{:.2f} times the mean work of a step ({:.2f} in plain order)".format(*lags)
            logger.info(f"ranks: the heaviest has {figures}, by tokens and patches")
        return loader

    def evaluation(self, pairs: Any) -> PairLoader:
        """Make the loader of pairs in the data set's own order."""
        return self._loader(pairs, per_device=self.args.eval_batch_size, accumulation=1, seed=None)

    def _loader(self, pairs: Any, **order: Any) -> PairLoader:
        workers = self.args.dataloader_num_workers
        return PairLoader(
            EncodedPairs(pairs, self.loader_encoder),
            batch_sampler=PairBatchSampler(
                len(pairs), world_size=self.accelerator.num_processes, rank=self.accelerator.process_index, **order
            ),
            collate_fn=self.collator,
            num_workers=workers,
            generator=torch.Generator(),  # its own: reading data must not move the random state of training
            persistent_workers=bool(workers) and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )
