"""Let the rewards that training computes enter delta, of all ranks at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmpo.loss import LossOutput, RewardShift
from vlmpo.train.batching import MicroBatch
from vlmpo.train.rank_sync import RankSync


class DeltaUpdates:
    """Moves delta by the rewards of a run.

    Args:
        shift: delta.
        ranks: the run's collectives.
        beta: scales log-ratios to rewards.
        device: of the run.
        with_rewards: whether the run has a reference, and with it rewards.
    """

    def __init__(
        self, shift: RewardShift, ranks: RankSync, *, beta: float, device: torch.device, with_rewards: bool
    ) -> None:
        self._shift = shift
        self._ranks = ranks
        self._beta = beta
        self._device = device
        self._with_rewards = with_rewards
        self._unread: list[Tensor] = []  # sums of rewards in the optimizer step under way, on this rank
        self._count = 0.0

    def before_loss(self, micro_batch: MicroBatch, policy: Tensor, reference: Tensor | None) -> None:
        """Let a micro-batch's mean reward, averaged over the ranks that have one, enter delta: mode ``running``.

        Args:
            micro_batch: the pairs.
            policy, reference: log-probs of their responses, ``[responses]``.
        """
        if self._shift.mode != "running" or reference is None or micro_batch.rejected is None:
            return
        responses = torch.cat([micro_batch.chosen, micro_batch.rejected])
        rewards = self._beta * (policy.detach() - reference)[responses]
        self._observe([float(rewards.mean()), 1.0] if rewards.numel() else [0.0, 0.0])

    def add(self, output: LossOutput) -> None:
        """Add the rewards of a micro-batch. They stay on the device: to read a number is to wait for it."""
        if output.chosen_rewards is not None and output.rejected_rewards is not None:
            self._unread += [output.chosen_rewards.sum(), output.rejected_rewards.sum()]
            self._count += 2.0 * len(output.chosen_rewards)

    def end_step(self) -> None:
        """Move delta, once, by the rewards of all ranks in the optimizer step: mode ``previous``."""
        if self._shift.mode == "previous" and self._with_rewards:
            rewards = torch.stack(self._unread).tolist() if self._unread else []
            self._observe([sum(rewards), self._count])
        self._shift.step()
        self._unread, self._count = [], 0.0

    def _observe(self, sum_and_count: list[float]) -> None:
        """Let rewards of all ranks enter delta, unless they are not finite: delta would never be finite again."""
        total, count = self._ranks.sum_over_ranks(sum_and_count, self._device)
        if math.isfinite(total):
            self._shift.observe(total, count)
