"""Loss and rewards on held-out pairs, over all ranks, without touching the state of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmpo.loss import mpo_loss
from vlmpo.stats import mean_interval, wilson
from vlmpo.train.batching import Batch, MicroBatch

SIMILAR_LENGTH = 0.8
STRONG_LENGTH_RATIO = 1.5

Score = Callable[[MicroBatch], tuple[Tensor, Tensor | None]]  # policy's and reference's log-probs, [responses]


class ScoredPair(NamedTuple):
    """One pair's log-probs, summed over scored tokens. The reference's and the rejected one's may be absent."""

    source: str
    chosen_length: int
    rejected_length: int | None
    policy_chosen: float
    policy_rejected: float | None
    reference_chosen: float | None
    reference_rejected: float | None


def evaluate_pairs(
    batches: Iterable[Batch],
    model: nn.Module,
    *,
    score: Score,
    gather: Callable[[Any], list[Any]],
    loss_settings: Mapping[str, Any],
    reward_shift: float,
) -> dict[str, float]:
    """Score held-out pairs and summarise them over all ranks; see :func:`pair_metrics`.

    Args:
        batches: of this rank, in step with the other ranks.
        model: the policy; in evaluation mode meanwhile.
        score: returns policy's and reference's log-probs of a micro-batch.
        gather: returns an object of every rank.
        loss_settings: keywords of :func:`vlmpo.loss.mpo_loss`.
        reward_shift: delta's present value.
    """
    was_training = model.training
    model.eval()
    scored: list[ScoredPair] = []
    dropped = 0
    with torch.no_grad():
        for batch in batches:
            dropped += len(batch.dropped)
            for micro_batch in batch.micro_batches:
                scored += _scored(micro_batch, *score(micro_batch))
    model.train(was_training)
    ranks = gather((scored, dropped))
    pairs = [pair for of_rank, _ in ranks for pair in of_rank]
    return pair_metrics(pairs, sum(count for _, count in ranks), loss_settings, reward_shift)


def _scored(micro_batch: MicroBatch, policy: Tensor, reference: Tensor | None) -> list[ScoredPair]:
    absent: list[float | None] = [None] * len(micro_batch)
    rejected = micro_batch.rejected if reference is not None else None
    lengths = micro_batch.response_lengths
    columns = (
        micro_batch.sources,
        micro_batch.chosen_lengths.tolist(),
        absent if rejected is None else [lengths[response] for response in rejected.tolist()],
        policy[micro_batch.chosen].tolist(),
        absent if rejected is None else policy[rejected].tolist(),
        absent if reference is None else reference[micro_batch.chosen].tolist(),
        absent if reference is None or rejected is None else reference[rejected].tolist(),
    )
    return [ScoredPair(*values) for values in zip(*columns, strict=True)]


def pair_metrics(
    pairs: Sequence[ScoredPair], num_dropped: int, loss_settings: Mapping[str, Any], reward_shift: float
) -> dict[str, float]:
    """Summarise scored pairs of all ranks: loss and terms, rewards and log-probs with 95 % intervals.

    With more than one data set, reward accuracy and margin of each are beside the total.

    Args:
        pairs: of all ranks.
        num_dropped: records that could not be used.
        loss_settings: keywords of :func:`vlmpo.loss.mpo_loss`.
        reward_shift: delta's present value.
    """
    metrics: dict[str, float] = {"pairs": len(pairs), "pairs_dropped": num_dropped}
    if not pairs:
        return metrics
    metrics |= _losses(pairs, loss_settings, reward_shift)
    metrics["logps/chosen"] = sum(pair.policy_chosen for pair in pairs) / len(pairs)
    if pairs[0].reference_chosen is None:
        return metrics
    metrics["logps/rejected"] = sum(pair.policy_rejected or 0.0 for pair in pairs) / len(pairs)
    beta = loss_settings["beta"]
    metrics |= _rewards(pairs, beta)
    metrics |= _by_length(pairs, beta)
    sources = sorted({pair.source for pair in pairs})
    for source in sources if len(sources) > 1 else ():
        of_source = [pair for pair in pairs if pair.source == source]
        metrics |= {f"{name}/{source}": value for name, value in _rewards(of_source, beta).items()}
        metrics[f"pairs/{source}"] = len(of_source)
    return metrics


def _column(values: Sequence[float | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    return torch.tensor(known, dtype=torch.float64) if len(known) == len(values) else None


def _losses(pairs: Sequence[ScoredPair], settings: Mapping[str, Any], reward_shift: float) -> dict[str, float]:
    chosen = _column([pair.policy_chosen for pair in pairs])
    assert chosen is not None
    output = mpo_loss(
        chosen,
        _column([pair.policy_rejected for pair in pairs]),
        _column([pair.reference_chosen for pair in pairs]),
        _column([pair.reference_rejected for pair in pairs]),
        torch.tensor([pair.chosen_length for pair in pairs], dtype=torch.float64),
        reward_shift=reward_shift,
        **settings,
    )
    return {"loss": output.loss.item(), **{f"loss/{name}": value.item() for name, value in output.terms.items()}}


def _reward_columns(pairs: Sequence[ScoredPair], beta: float) -> tuple[list[float], list[float]]:
    chosen = [beta * (pair.policy_chosen - (pair.reference_chosen or 0.0)) for pair in pairs]
    rejected = [beta * ((pair.policy_rejected or 0.0) - (pair.reference_rejected or 0.0)) for pair in pairs]
    return chosen, rejected


def _by_length(pairs: Sequence[ScoredPair], beta: float) -> dict[str, float]:
    """Return mean lengths, and reward accuracy among pairs whose length cannot give the answer away.

    Responses are of similar length if the shorter has at least SIMILAR_LENGTH of the longer's tokens.
    """
    lengths = [(pair.chosen_length, pair.rejected_length or 0) for pair in pairs]
    metrics = {
        "lengths/chosen": sum(chosen for chosen, _ in lengths) / len(pairs),
        "lengths/rejected": sum(rejected for _, rejected in lengths) / len(pairs),
    }
    similar = [p for p, (c, r) in zip(pairs, lengths, strict=True) if min(c, r) >= SIMILAR_LENGTH * max(c, r)]
    metrics["pairs_similar_length"] = len(similar)
    if similar:
        right = sum(c > r for c, r in zip(*_reward_columns(similar, beta), strict=True))
        low, high = wilson(right, len(similar))
        metrics["rewards/accuracies_similar_length"] = right / len(similar)
        metrics["rewards/accuracies_similar_length_low"] = low
        metrics["rewards/accuracies_similar_length_high"] = high
    return metrics


def length_warning(metrics: Mapping[str, float], prefix: str) -> str | None:
    """Return a warning if chosen and rejected lengths differ so much that length alone may decide."""
    chosen, rejected = metrics.get(f"{prefix}_lengths/chosen"), metrics.get(f"{prefix}_lengths/rejected")
    if chosen is None or rejected is None or max(chosen, rejected) <= STRONG_LENGTH_RATIO * min(chosen, rejected):
        return None
    return (
        f"{prefix}: chosen responses have {chosen:.0f} tokens, rejected ones {rejected:.0f} on average; "
        "reward accuracy may measure length (see rewards/accuracies_similar_length)"
    )


def _rewards(pairs: Sequence[ScoredPair], beta: float) -> dict[str, float]:
    chosen, rejected = _reward_columns(pairs, beta)
    right = sum(c > r for c, r in zip(chosen, rejected, strict=True))
    low, high = wilson(right, len(pairs))
    margin, margin_low, margin_high = mean_interval([c - r for c, r in zip(chosen, rejected, strict=True)])
    return {
        "rewards/chosen": sum(chosen) / len(pairs),
        "rewards/rejected": sum(rejected) / len(pairs),
        "rewards/accuracies": right / len(pairs),
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
        "rewards/margins": margin,
        "rewards/margins_low": margin_low,
        "rewards/margins_high": margin_high,
    }
