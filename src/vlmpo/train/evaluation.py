"""Loss and rewards on held-out pairs, over all ranks, without touching the state of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vlmpo.loss import mpo_loss
from vlmpo.stats import mean_interval, wilson
from vlmpo.train.sharding import prepare_to_score

if TYPE_CHECKING:
    from vlmpo.train.batching import MicroBatch, Unusable
    from vlmpo.train.sampler import PairLoader
    from vlmpo.train.trainer import MPOTrainer


SIMILAR_LENGTH = 0.8
STRONG_LENGTH_RATIO = 1.5


class ScoredPair(NamedTuple):
    """One pair's log-probs, summed over scored tokens. The reference's and the rejected one's may be absent."""

    source: str
    chosen_length: int
    rejected_length: int | None
    policy_chosen: float
    policy_rejected: float | None
    reference_chosen: float | None
    reference_rejected: float | None


def score_pairs(trainer: MPOTrainer, loader: PairLoader) -> tuple[list[ScoredPair], list[Unusable]]:
    """Policy and reference log-probs of every pair, from all ranks; and the records that could not be used.

    Raises:
        RecordError: some rank met a bad record under ``on_bad_record="fail"``; all of them raise it.
        RunError: the wrapper of the run cannot score before training.
    """
    model = _ready(trainer)
    was_training = model.training
    model.eval()
    scored: list[ScoredPair] = []
    dropped: list[Unusable] = []
    with torch.no_grad():
        for batch in loader:
            fatal = batch.dropped[0].error if trainer.args.on_bad_record == "fail" and batch.dropped else None
            dropped += batch.dropped
            work = trainer.rank_sync.agree([batch], fatal)
            (level,) = trainer.rank_sync.level([batch], work, model)
            for part in level.parts:
                scored += _score(trainer, model, trainer._prepare_inputs(part))
    model.train(was_training)
    gathered = trainer._gathered((scored, dropped))
    return [pair for pairs, _ in gathered for pair in pairs], [item for _, items in gathered for item in items]


def _ready(trainer: MPOTrainer) -> torch.nn.Module:
    """The policy as training calls it. Asked before training, it is under no wrapper, autocast or sharding yet."""
    model = trainer.model_wrapped
    if getattr(model, "_is_accelerate_prepared", False):
        return model
    if not getattr(model, "_vlmpo_ready", False):
        model = prepare_to_score(trainer.accelerator, model)
        model._vlmpo_ready = True  # type: ignore[assignment]
    return model


def _score(trainer: MPOTrainer, model: torch.nn.Module, part: MicroBatch) -> list[ScoredPair]:
    policy, reference = trainer.response_logps(model, part)
    nothing: list[float | None] = [None] * len(part)
    rejected = part.rejected if reference is not None else None
    lengths = part.response_lengths
    columns = (
        part.sources,
        part.chosen_lengths.tolist(),
        nothing if rejected is None else [lengths[response] for response in rejected.tolist()],
        policy[part.chosen].tolist(),
        nothing if rejected is None else policy[rejected].tolist(),
        nothing if reference is None else reference[part.chosen].tolist(),
        nothing if reference is None or rejected is None else reference[rejected].tolist(),
    )
    return [ScoredPair(*values) for values in zip(*columns, strict=True)]


def evaluate_pairs(trainer: MPOTrainer, loader: PairLoader) -> dict[str, float]:
    """Metrics on held-out pairs: loss and terms at delta's present value, rewards and log-probs with 95 % intervals.

    With more than one data set, reward accuracy and margin of each stand beside the total.
    """
    pairs, dropped = score_pairs(trainer, loader)
    metrics: dict[str, float] = {"pairs": len(pairs), "pairs_dropped": len(dropped)}
    if not pairs:
        return metrics
    metrics |= _losses(trainer, pairs)
    metrics["logps/chosen"] = sum(pair.policy_chosen for pair in pairs) / len(pairs)
    if pairs[0].reference_chosen is None:
        return metrics
    metrics["logps/rejected"] = sum(pair.policy_rejected or 0.0 for pair in pairs) / len(pairs)
    metrics |= _rewards(pairs, trainer.args.beta)
    metrics |= _by_length(pairs, trainer.args.beta)
    sources = sorted({pair.source for pair in pairs})
    for source in sources if len(sources) > 1 else ():
        own = [pair for pair in pairs if pair.source == source]
        metrics |= {f"{name}/{source}": value for name, value in _rewards(own, trainer.args.beta).items()}
        metrics[f"pairs/{source}"] = len(own)
    return metrics


def _column(values: Sequence[float | None]) -> torch.Tensor | None:
    known = [value for value in values if value is not None]
    return torch.tensor(known, dtype=torch.float64) if len(known) == len(values) else None


def _losses(trainer: MPOTrainer, pairs: list[ScoredPair]) -> dict[str, float]:
    chosen = _column([pair.policy_chosen for pair in pairs])
    assert chosen is not None
    output = mpo_loss(
        chosen,
        _column([pair.policy_rejected for pair in pairs]),
        _column([pair.reference_chosen for pair in pairs]),
        _column([pair.reference_rejected for pair in pairs]),
        torch.tensor([pair.chosen_length for pair in pairs], dtype=torch.float64),
        reward_shift=trainer.reward_shift.value,
        **trainer.args.loss_settings,
    )
    return {"loss": output.loss.item(), **{f"loss/{name}": value.item() for name, value in output.terms.items()}}


def _reward_columns(pairs: list[ScoredPair], beta: float) -> tuple[list[float], list[float]]:
    chosen = [beta * (pair.policy_chosen - (pair.reference_chosen or 0.0)) for pair in pairs]
    rejected = [beta * ((pair.policy_rejected or 0.0) - (pair.reference_rejected or 0.0)) for pair in pairs]
    return chosen, rejected


def _by_length(pairs: list[ScoredPair], beta: float) -> dict[str, float]:
    """Mean lengths, and reward accuracy where length cannot give the answer away.

    Responses are of similar length when the shorter has at least SIMILAR_LENGTH of the longer's tokens.
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


def length_warning(metrics: dict[str, float], prefix: str) -> str | None:
    """A line for the user where chosen and rejected lengths differ so much that length alone may decide."""
    chosen, rejected = metrics.get(f"{prefix}_lengths/chosen"), metrics.get(f"{prefix}_lengths/rejected")
    if chosen is None or rejected is None or max(chosen, rejected) <= STRONG_LENGTH_RATIO * min(chosen, rejected):
        return None
    return (
        f"{prefix}: chosen responses have {chosen:.0f} tokens, rejected ones {rejected:.0f} on average; "
        "reward accuracy may measure length (see rewards/accuracies_similar_length)"
    )


def _rewards(pairs: list[ScoredPair], beta: float) -> dict[str, float]:
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
