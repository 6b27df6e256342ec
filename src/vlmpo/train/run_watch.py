"""Watch a run's data, numbers and weights, and end it, on all ranks alike, once they are good for nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from vlmpo.errors import VlmpoError, met_by_all
from vlmpo.log import logger
from vlmpo.models.finite import non_finite_weights
from vlmpo.train.checkpoint import last_complete_checkpoint
from vlmpo.train.config import MPOConfig
from vlmpo.train.counts import EXAMPLES, PairCounts, nothing_left
from vlmpo.train.data_watch import DataWatch
from vlmpo.train.rank_sync import RankSync, StepInfo
from vlmpo.train.runaway import RunawayWatch
from vlmpo.train.step_watch import StepWatch, non_finite_error, unsaved_error

_REMEDY = "put the files back or correct the records (data.max_bad_share: how many files may fail)"


class RunWatch:
    """Holds the watches of a run; every rank calls every method.

    Args:
        args: the settings of the run.
        ranks: its collectives.
        counts: returns what became of the pairs, over all ranks.
        deepspeed: whether DeepSpeed makes the steps, before their gradient's norm is known.

    Attributes:
        numbers: of the optimizer step under way.
        step_is_empty: whether no rank has a pair in it.
        runaway: warns of run-aways.
    """

    def __init__(self, args: MPOConfig, ranks: RankSync, *, counts: Callable[[], PairCounts], deepspeed: bool) -> None:
        self.numbers = StepWatch()
        self.step_is_empty = False
        self._args = args
        self._ranks = ranks
        self._counts = counts
        self._deepspeed = deepspeed
        self.runaway = RunawayWatch(args.beta)
        self.start()

    def start(self) -> None:
        """Begin training: count what it reads from now on."""
        self._data = DataWatch(self._args.max_bad_share)

    def see_data(self, info: StepInfo, pair_counts: PairCounts, *, step: int, epoch: float) -> None:
        """Look at what an optimizer step will read; note a step without a pair.

        Args:
            info: of all ranks.
            pair_counts: of this rank.
            step: number of the step, from 1.
            epoch: epochs done before it.

        Raises:
            DataError: there is nothing, or too little, to train on.
        """
        fault = self._data.see(records=info.records, usable=info.pairs, failed=info.failed, epoch=epoch)
        if fault is not None:
            raise self.nothing_left(fault)
        self.step_is_empty = info.pairs == 0
        if self.step_is_empty and self._ranks.accelerator.is_main_process:  # one rank counts what all ranks share
            pair_counts.empty_steps += 1
            if pair_counts.empty_steps <= EXAMPLES:
                logger.info(f"step {step} has no usable pair: it moves no weight")

    def end_data(self, epoch: float) -> None:
        """End training, ``epoch`` epochs done. Raises DataError if there was nothing, or too little, to train on."""
        if fault := self._data.finish(epoch):
            raise self.nothing_left(fault)

    def nothing_left(self, fault: str) -> VlmpoError:
        """Return the error of a run without data, for all ranks."""
        return met_by_all(nothing_left(f"data.train: {fault}", self._counts(), _REMEDY))

    def may_move(self, norm: float, step: int) -> bool:
        """Return whether the weights may move by a gradient of this norm; warn if it is far above those before.

        Raises:
            RunError: it, a loss or a log-prob is not finite.
        """
        numbers, finite = self.numbers, math.isfinite(norm)
        if not numbers.excuses(finite, scaled=self._ranks.accelerator.mixed_precision == "fp16"):
            raise self._non_finite(norm, step)
        if numbers.skipped == 1 and numbers.overflows:
            logger.info(f"step {step} overflows in fp16: its loss scaler skips such steps")
        if self.step_is_empty or not finite:
            return False
        if warning := self.runaway.see_norm(step, norm):
            logger.info(f"warning: {warning}")
        return True

    def see_log(self, step: int, logs: dict[str, Any]) -> None:
        """Warn of a run that runs away."""
        for warning in self.runaway.see_log(step, logs):
            logger.info(f"warning: {warning}")

    def check_weights(self, model: nn.Module, step: int) -> None:
        """Raise RunError if a weight is not finite: on this rank, or on any if each holds a shard."""
        bad = non_finite_weights(model)
        if self._ranks.share_passes:
            bad = [weight for rank in self._ranks.all_gather(bad) for weight in rank]
        if bad:
            raise met_by_all(unsaved_error(bad, step, last_complete_checkpoint(self._args.output_dir)))

    def _non_finite(self, norm: float, step: int) -> VlmpoError:
        error = non_finite_error(
            self._ranks.all_gather(self.numbers.report()),
            step=step,
            grad_norm=norm,
            overflows=self.numbers.overflows,
            checkpoint=last_complete_checkpoint(self._args.output_dir),
            moved=self._deepspeed,
        )
        return met_by_all(error)
