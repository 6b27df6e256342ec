"""Loss and rewards on held-out pairs, over all ranks, without touching the state of training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vlmpo.train.metrics import ScoredPair, evaluation_metrics
from vlmpo.train.sharding import prepare_to_score

if TYPE_CHECKING:
    from vlmpo.train.batching import MicroBatch, Unusable
    from vlmpo.train.sampler import PairLoader
    from vlmpo.train.trainer import MPOTrainer


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

    With more than one data set, rewards of each are beside the total.
    """
    pairs, dropped = score_pairs(trainer, loader)
    return evaluation_metrics(
        pairs,
        num_dropped=len(dropped),
        reward_shift=trainer.reward_shift.value,
        loss_settings=trainer.args.loss_settings,
    )
