"""Metrics by hand: of training steps from sums, of an evaluation from scored pairs."""

from __future__ import annotations

import math

import pytest
import torch

from vlmpo.loss import LossOutput
from vlmpo.stats import wilson
from vlmpo.train.metrics import (
    ScoredPair,
    StepSums,
    add_up,
    carried_on,
    evaluation_metrics,
    length_warning,
    reward_metrics,
    training_metrics,
)


def output(terms: dict[str, float], chosen: list[float] | None, rejected: list[float] | None) -> LossOutput:
    rewards = [None if values is None else torch.tensor(values) for values in (chosen, rejected)]
    return LossOutput(torch.tensor(0.0), {name: torch.tensor(value) for name, value in terms.items()}, *rewards)


def two_ranks() -> dict[str, float]:
    """Two steps on two ranks, three pairs in all: rewards 2 > 1 and a tie in ``a``, -1 < 3 in ``b``."""
    first, second = StepSums(), StepSums()
    first.add(
        output({"sigmoid": 0.25, "nll": 1.0}, [2.0, 1.0], [1.0, 1.0]),
        chosen_logps=torch.tensor([-4.0, -6.0]),
        rejected_logps=torch.tensor([-5.0, -9.0]),
        sources=["a", "a"],
        num_tokens=30,
    )
    second.add(
        output({"sigmoid": 0.75, "nll": 2.0}, [-1.0], [3.0]),
        chosen_logps=torch.tensor([-2.0]),
        rejected_logps=torch.tensor([-1.0]),
        sources=["b"],
        num_tokens=12,
    )
    return add_up([first.values, second.values])


def test_training_metrics_by_hand() -> None:
    total = two_ranks()
    assert (total["pairs"], total["tokens"]) == (3, 42)
    found = training_metrics(total, steps=2)
    assert found == {
        "loss/sigmoid": (0.25 + 0.75) / 2,  # shares of each step's mean add up; then a mean over steps
        "loss/nll": 3.0 / 2,
        "logps/chosen": -12.0 / 3,
        "logps/rejected": -15.0 / 3,
        "rewards/chosen": 2.0 / 3,
        "rewards/rejected": 5.0 / 3,
        "rewards/margins": 2.0 / 3 - 5.0 / 3,
        "rewards/accuracies": 1.0 / 3,  # a tie is not right
        "rewards/accuracies/a": 0.5,
        "rewards/accuracies/b": 0.0,
        "pairs/a": 2.0,
        "pairs/b": 1.0,
    }


def test_supervised_fine_tuning_has_no_rewards() -> None:
    sums = StepSums()
    sums.add(
        output({"nll": 0.5}, None, None),
        chosen_logps=torch.tensor([-4.0]),
        rejected_logps=None,
        sources=["a"],
        num_tokens=5,
    )
    assert training_metrics(sums.values, steps=1) == {"loss/nll": 0.5, "logps/chosen": -4.0}
    assert training_metrics({}, steps=1) == {}


def test_rewards_by_hand() -> None:
    """Margins 3, 1 and -1: mean 1, standard deviation 2, so 1 -+ 1.96 x 2 / sqrt(3)."""
    found = reward_metrics(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([-1.0, 0.0, 1.0]))
    half = 1.959963984540054 * 2 / math.sqrt(3)
    low, high = wilson(2, 3)
    assert found == {
        "rewards/chosen": 1.0,
        "rewards/rejected": 0.0,
        "rewards/accuracies": 2 / 3,
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
        "rewards/margins": pytest.approx(1.0),
        "rewards/margins_low": pytest.approx(1.0 - half),
        "rewards/margins_high": pytest.approx(1.0 + half),
    }


def scored(source: str, lengths: tuple[int, int], chosen: float, rejected: float) -> ScoredPair:
    """A pair whose reference gives -10 to both responses."""
    return ScoredPair(source, *lengths, chosen, rejected, -10.0, -10.0)


def test_an_evaluation_by_hand() -> None:
    """At beta 0.5 the rewards are 1 | 0, 0 | 1 and 2 | -1; the shift takes 0.5 from each in the bco term."""
    pairs = [
        scored("a", (4, 5), -8.0, -10.0),  # 4 is 80 % of 5: of similar length
        scored("a", (4, 6), -10.0, -8.0),
        scored("b", (10, 2), -6.0, -12.0),
    ]
    settings = {"weights": {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0}, "beta": 0.5}
    found = evaluation_metrics(pairs, num_dropped=2, reward_shift=0.5, loss_settings=settings)

    def cost(margin: float) -> float:  # -log sigmoid
        return math.log1p(math.exp(-margin))

    terms = {
        "sigmoid": (cost(1) + cost(-1) + cost(3)) / 3,
        "bco_pair": (2 * cost(0.5) + 2 * cost(-0.5) + cost(1.5) + cost(1.5)) / 3,
        "nll": (8 / 4 + 10 / 4 + 6 / 10) / 3,
    }
    for name, value in terms.items():
        assert found[f"loss/{name}"] == pytest.approx(value, rel=1e-12)
    assert found["loss"] == pytest.approx(0.8 * terms["sigmoid"] + 0.2 * terms["bco_pair"] + terms["nll"], rel=1e-12)
    assert (found["pairs"], found["pairs_dropped"]) == (3, 2)
    assert (found["logps/chosen"], found["logps/rejected"]) == (-8.0, -10.0)
    assert (found["lengths/chosen"], found["lengths/rejected"]) == (6.0, 13 / 3)
    assert (found["rewards/chosen"], found["rewards/rejected"], found["rewards/accuracies"]) == (1.0, 0.0, 2 / 3)
    assert (found["pairs_similar_length"], found["rewards/accuracies_similar_length"]) == (1, 1.0)
    assert found["rewards/accuracies_similar_length_low"] == wilson(1, 1)[0]
    assert (found["pairs/a"], found["rewards/accuracies/a"], found["rewards/margins/a"]) == (2, 0.5, 0.0)
    assert (found["pairs/b"], found["rewards/accuracies/b"], found["rewards/margins/b"]) == (1, 1.0, 3.0)


def test_what_an_evaluation_lacks() -> None:
    sft = {"weights": {"nll": 1.0}}
    none = evaluation_metrics([], num_dropped=3, reward_shift=0.0, loss_settings=sft)
    assert none == {"pairs": 0, "pairs_dropped": 3}
    pair = ScoredPair("a", 4, None, -8.0, None, None, None)
    found = evaluation_metrics([pair], num_dropped=0, reward_shift=0.0, loss_settings=sft)
    assert found == {"pairs": 1, "pairs_dropped": 0, "loss": 2.0, "loss/nll": 2.0, "logps/chosen": -8.0}
    preferences = {"weights": {"sigmoid": 1.0}}
    found = evaluation_metrics([scored("a", (1, 9), 0, 0)], num_dropped=0, reward_shift=0.0, loss_settings=preferences)
    assert found["pairs_similar_length"] == 0
    assert not {name for name in found if name.startswith("rewards/accuracies_similar_length")}


def test_a_warning_if_length_may_decide() -> None:
    metrics = {"eval_lengths/chosen": 30.0, "eval_lengths/rejected": 20.0}
    assert length_warning(metrics, "eval") is None  # half as long again is not too much
    assert length_warning(metrics, "other") is None
    told = length_warning({**metrics, "eval_lengths/rejected": 19.0}, "eval")
    assert told is not None
    assert told.startswith("eval: chosen responses have 30 tokens, rejected ones 19 on average")


# ---- what a resumed run carries on ----


def test_the_same_number_of_ranks_goes_on_as_it_was() -> None:
    window = [{"loss": {"total": 3.0, "since_log": r, "logged": 4}, "sums": {"steps": 2.0, "pairs": r}} for r in (1, 2)]
    for rank in (0, 1):
        assert carried_on(window, rank, 2) == (window[rank]["loss"], window[rank]["sums"])


@pytest.mark.parametrize("ranks", [1, 3])
def test_on_other_ranks_nothing_counts_twice(ranks: int) -> None:
    """Sums add up to what they were; a step is one step, however many ranks make it."""
    sums = [{"steps": 2.0, "empty_steps": 1.0, "pairs": pairs, "loss/nll": 0.5} for pairs in (3.0, 4.0)]
    window = [{"loss": {"total": 3.0, "since_log": 1.0 + n, "logged": 4}, "sums": of} for n, of in enumerate(sums)]
    found = [carried_on(window, rank, ranks) for rank in range(ranks)]
    assert all(loss == {"total": 3.0, "since_log": 1.5, "logged": 4} for loss, _ in found)
    total = add_up([of for _, of in found])
    assert (total["pairs"], total["loss/nll"]) == (7.0, 1.0)
    assert (total["steps"], total["empty_steps"]) == (2.0 * ranks, 1.0 * ranks)


def test_a_sum_that_was_not_finite_stays_so() -> None:
    """JSON has no word for it: it is null there."""
    loss, sums = carried_on([{"loss": {"total": None, "logged": 4}, "sums": {"loss/nll": None, "pairs": 2.0}}], 0, 1)
    assert math.isnan(loss["total"])
    assert math.isnan(sums["loss/nll"])
    assert (loss["logged"], sums["pairs"]) == (4, 2.0)
