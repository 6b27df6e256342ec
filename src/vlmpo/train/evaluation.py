"""Evaluate a policy on held-out pairs over all ranks, without changing the state of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmpo.models.mode import in_mode
from vlmpo.train.batching import Batch, MicroBatch
from vlmpo.train.metrics import ScoredPair, evaluation_metrics

Logps = tuple[Tensor, Tensor | None]  # policy's and reference's, [responses]
Score = Callable[[MicroBatch], Iterable[tuple[MicroBatch, Logps]]]


def evaluate_pairs(
    batches: Iterable[Batch],
    model: nn.Module,
    *,
    score: Score,
    gather: Callable[[Any], list[Any]],
    loss_settings: Mapping[str, Any],
    reward_shift: float,
) -> dict[str, float]:
    """Score held-out pairs and summarise them over all ranks; see :func:`evaluation_metrics`.

    Args:
        batches: batches of this rank, as many as the other ranks have.
        model: the policy; it is put into evaluation mode while it is read.
        score: yields the log-probs of policy and reference for a micro-batch, or for parts of it.
        gather: returns the object that each rank gives.
        loss_settings: keywords of :func:`vlmpo.loss.mpo_loss`.
        reward_shift: delta's present value.
    """
    scored: list[ScoredPair] = []
    dropped = 0
    with torch.no_grad(), in_mode(model, training=False):
        for batch in batches:
            dropped += len(batch.dropped)
            for micro_batch in batch.micro_batches:
                for part, logps in score(micro_batch):
                    scored += _scored(part, *logps)
    ranks = gather((scored, dropped))
    pairs = [pair for of_rank, _ in ranks for pair in of_rank]
    dropped = sum(count for _, count in ranks)
    return evaluation_metrics(pairs, num_dropped=dropped, reward_shift=reward_shift, loss_settings=loss_settings)


def _scored(micro_batch: MicroBatch, policy: Tensor, reference: Tensor | None) -> list[ScoredPair]:
    def column(values: Tensor | None, responses: Tensor | None) -> list[Any]:
        return [None] * len(micro_batch) if values is None or responses is None else values[responses].tolist()

    chosen, rejected = micro_batch.chosen, None if reference is None else micro_batch.rejected
    lengths = torch.tensor(micro_batch.response_lengths, device=policy.device)
    columns = (
        micro_batch.sources,
        micro_batch.chosen_lengths.tolist(),
        column(lengths, rejected),
        column(policy, chosen),
        column(policy, rejected),
        column(reference, chosen),
        column(reference, rejected),
    )
    return [ScoredPair(*values) for values in zip(*columns, strict=True)]
