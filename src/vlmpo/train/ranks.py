"""The part of the trainer that knows there are other ranks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlmpo.log import logger
from vlmpo.train.reference import unwrap_peft
from vlmpo.train.sharding import all_gather_object, configure_fsdp, passes_are_shared, whole_state_dict
from vlmpo.tree.recompute import keep_all


class RanksTrainer(Trainer):
    """transformers' Trainer with exact sums over ranks, and a sharded model that is saved whole."""

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers has it; refuses wrappers that cannot be exact, and has one process use one GPU."""
        if self.args.n_gpu > 1:  # transformers would use all by DataParallel, which gives each the same rows
            logger.info(
                f"one of {self.args.n_gpu} GPUs is used; to use all, start with "
                f"torchrun --nproc_per_node {self.args.n_gpu} (docs/ranks.md)"
            )
            self.args._n_gpu = 1
        super().create_accelerator_and_postprocess()
        configure_fsdp(self.accelerator, self.model)
        if passes_are_shared(self.accelerator):
            keep_all(unwrap_peft(self.model))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model whole, also where checkpoints hold shards: of those transformers would write nothing."""
        folder = Path(output_dir or self.args.output_dir)
        checkpoint = folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        with contextlib.nullcontext() if checkpoint else whole_state_dict(self.accelerator):
            super().save_model(output_dir, _internal_call)

    def _gathered(self, mine: Any) -> list[Any]:
        """``mine`` of every rank, in order of the ranks."""
        return all_gather_object(self.accelerator, mine)

    def _over_ranks(self, values: list[float], device: torch.device) -> list[float]:
        """Each value summed over ranks, in float64 where the device has it."""
        if self.accelerator.num_processes == 1:
            return [float(value) for value in values]
        kind = torch.float32 if device.type == "mps" else torch.float64
        summed = self.accelerator.reduce(torch.tensor(values, dtype=kind, device=device), reduction="sum")
        return [float(value) for value in summed]
