"""A step's pairs over ranks: the same pairs, equal work, groups whole; by hand and for any costs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmpo.train.sampler import PairBatchSampler, PairCosts, Split, bring_prompts_together, deal_out, shuffle


def costs(*pair: int, prompt: int = 0) -> PairCosts:
    return PairCosts(np.array(pair, np.int32), np.array([min(prompt, cost) for cost in pair], np.int32))


def of_one_step(num_ranks: int, per_device: int, pair_costs: PairCosts, **settings: Any) -> PairBatchSampler:
    """Take the whole data set in order, as one step."""
    count = len(pair_costs.pair)
    accumulation = -(-count // (num_ranks * per_device))
    shape = {"num_ranks": num_ranks, "per_device": per_device, "accumulation": accumulation}
    return PairBatchSampler(num_pairs=count, costs=pair_costs, **shape, **settings)


def even(num_ranks: int, per_device: int, pair_costs: PairCosts, **settings: Any) -> Split:
    """Split that step."""
    made = of_one_step(num_ranks, per_device, pair_costs, **settings)
    (step,) = made.steps()
    return made.split(step)


def test_heaviest_first_to_the_lightest_rank_by_hand() -> None:
    """9 | 8, then 7 beside 8, and 2 to 9: full is rank 1 then, so the rest is rank 0's. 9 + 2 + 1 | 8 + 7."""
    step = [4, 0, 1, 3, 2]
    made = of_one_step(2, 2, costs(8, 2, 9, 1, 7))
    assert made.split(step) == [[[2, 1], [3]], [[0, 4], []]]
    assert made.split(step, balanced=False) == deal_out(step, num_ranks=2, per_device=2)
    assert deal_out(step, num_ranks=2, per_device=2) == [[[4, 0], [2]], [[1, 3], []]]


def test_imbalance_by_hand() -> None:
    """In order it is 9 + 7 + 2 | 8 + 1; balanced 9 + 2 + 1 | 8 + 7: the mean is 13.5."""
    made = of_one_step(2, 2, costs(9, 7, 8, 1, 2))
    assert made.mean_imbalance(1, balanced=False) == pytest.approx(18 / 13.5)
    assert made.mean_imbalance(1) == made.mean_imbalance(100) == pytest.approx(15 / 13.5)


def test_a_heavy_rank_gets_light_pairs_to_fill_up() -> None:
    """Each rank takes three pairs: 30 needs the two lightest beside it."""
    assert even(2, 1, costs(30, 1, 2, 10, 11, 12)) == [[[0], [2], [1]], [[5], [4], [3]]]


def test_if_greed_does_worse_than_chance_the_order_stays() -> None:
    """Greed puts 3 + 2 + 2 beside 3 + 2 + 0; in order it is 6 and 6."""
    assert even(2, 3, costs(3, 3, 0, 2, 2, 2)) == [[[0, 1, 2]], [[3, 4, 5]]]


def test_equal_costs_are_dealt_out_in_order() -> None:
    assert of_one_step(2, 2, costs(*[7] * 6)).split([5, 3, 1, 0]) == [[[5, 1]], [[3, 0]]]
    assert of_one_step(2, 2, costs(*[0] * 6)).split([5, 3, 1]) == [[[5, 3]], [[1]]]


def test_a_group_goes_as_one_and_reads_its_prompt_once() -> None:
    """a: 3 x 10 of which 8 are the prompt: 14 together. So the lone 12 and 9 stand against it, not against 30."""
    keys = [b"a", b"a", b"a", b"b", b"c", b"d"]
    made = of_one_step(2, 3, costs(10, 10, 10, 12, 9, 1, prompt=8), keys=keys, max_group=3)
    assert made.split(range(6)) == [[[0, 1, 2]], [[3, 4, 5]]]
    assert made.mean_imbalance(1) == pytest.approx(22 / 18)


def test_a_group_is_divided_only_if_no_rank_has_room() -> None:
    """Three groups of two, two ranks of three: the lightest group is cut, one of its pairs on each."""
    keys = [b"a", b"a", b"b", b"b", b"c", b"c"]
    assert even(2, 3, costs(9, 9, 8, 8, 5, 5), keys=keys, max_group=2) == [[[0, 1, 5]], [[2, 3, 4]]]


def test_a_group_is_divided_inside_a_rank_only_if_no_micro_batch_has_room() -> None:
    keys = [b"a", b"a", b"b", b"b", b"c", b"c"]
    assert even(1, 3, costs(9, 9, 8, 8, 5, 5), keys=keys, max_group=2) == [[[0, 1, 4], [2, 3, 5]]]


@st.composite
def runs(draw: Any) -> dict[str, Any]:
    count = draw(st.integers(1, 60))
    group = draw(st.integers(1, 4))
    return {
        "ranks": draw(st.integers(1, 5)),
        "settings": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        "seed": draw(st.integers(0, 99)),
        "drop_last": draw(st.booleans()),
        "labels": [b"%d" % draw(st.integers(0, 5)) for _ in range(count)] if group > 1 else None,
        "group": group,
        "costs": costs(*draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count)), prompt=200),
    }


def samplers(run: dict[str, Any], with_costs: bool) -> list[PairBatchSampler]:
    (per_device, accumulation), ranks = run["settings"], run["ranks"]
    return [
        PairBatchSampler(
            num_pairs=len(run["costs"].pair),
            per_device=per_device,
            accumulation=accumulation,
            num_ranks=ranks,
            rank=rank,
            seed=run["seed"],
            drop_last=run["drop_last"],
            keys=run["labels"],
            max_group=run["group"],
            costs=run["costs"] if with_costs else None,
        )
        for rank in range(ranks)
    ]


def by_step(all_ranks: list[PairBatchSampler], accumulation: int) -> list[list[list[list[int]]]]:
    """By optimizer step, by rank: micro-batches."""
    batches = [list(sampler) for sampler in all_ranks]
    assert [len(of_rank) for of_rank in batches] == [len(sampler) for sampler in all_ranks]
    assert len({len(of_rank) for of_rank in batches}) == 1  # equally many on all ranks
    starts = range(0, len(batches[0]), accumulation)
    return [[of_rank[start : start + accumulation] for of_rank in batches] for start in starts]


def flat(split: list[list[list[int]]]) -> list[int]:
    return [pair for rank in split for batch in rank for pair in batch]


@settings(max_examples=300, deadline=None)
@given(runs())
def test_the_steps_are_the_plain_ones_and_ranks_are_nearer_to_each_other(run: dict[str, Any]) -> None:
    per_device, accumulation = run["settings"]
    balanced, plain = (by_step(samplers(run, with_costs), accumulation) for with_costs in (True, False))
    assert balanced == by_step(samplers(run, True), accumulation)
    assert len(balanced) == len(plain)
    order = shuffle(len(run["costs"].pair), seed=run["seed"], epoch=0)
    if run["labels"] is not None:
        order = bring_prompts_together(order, run["labels"], run["group"])
    for at, (even_step, plain_step) in enumerate(zip(balanced, plain, strict=True)):
        size = per_device * accumulation * run["ranks"]
        step = order[at * size : (at + 1) * size]
        assert sorted(flat(even_step)) == sorted(flat(plain_step)) == sorted(step)
        assert all(len(batch) <= per_device for rank in even_step for batch in rank)
        assert plain_step == deal_out(step, num_ranks=run["ranks"], per_device=per_device)
        if run["labels"] is None:
            heaviest = [
                max(sum(int(run["costs"].pair[pair]) for batch in rank for pair in batch) for rank in split)
                for split in (even_step, plain_step)
            ]
            assert heaviest[0] <= heaviest[1]
            for rank in even_step:  # heaviest first
                by_pair = [int(run["costs"].pair[pair]) for batch in rank for pair in batch]
                assert by_pair == sorted(by_pair, reverse=True)


@settings(max_examples=300, deadline=None)
@given(runs())
def test_groups_are_divided_only_for_want_of_room(run: dict[str, Any]) -> None:
    """At most one group is cut at each rank's end, as its room is filled; with rooms of whole groups, none."""
    per_device, accumulation = run["settings"]
    made = samplers(run, True)[0]
    step = bring_prompts_together(range(made.num_pairs), run["labels"], run["group"]) if run["labels"] else []
    step = step[: per_device * accumulation * run["ranks"]]
    if not step:
        return
    units = made.groups(step)
    found = made.split(step)
    rank_of = {pair: at for at, rank in enumerate(found) for batch in rank for pair in batch}
    cut = sum(len({rank_of[pair] for pair in unit}) - 1 for unit in units)
    assert cut < run["ranks"]
    if len({len(unit) for unit in units}) == 1 and per_device % len(units[0]) == 0:
        assert cut == 0
        batch_of = {pair: (r, b) for r, rank in enumerate(found) for b, batch in enumerate(rank) for pair in batch}
        assert all(len({batch_of[pair] for pair in unit}) == 1 for unit in units)
    for batch in (batch for rank in found for batch in rank):  # what is together is adjacent
        for unit in units:
            places = [at for at, pair in enumerate(batch) if pair in unit]
            assert all(b - a == 1 for a, b in itertools.pairwise(places))


def test_another_epoch_another_order_and_skewed_work_is_shared_evenly() -> None:
    run = {"ranks": 2, "settings": (2, 2), "seed": 3, "drop_last": False, "labels": None, "group": 1}
    run["costs"] = costs(*np.random.default_rng(0).integers(1, 500, 37).tolist())
    first, second = samplers(run, True)
    before = list(first)
    first.epoch = 1
    assert list(first) != before
    first.epoch = 0
    assert list(first) == before
    assert first.mean_imbalance(100) == second.mean_imbalance(100)
    assert 1.0 <= first.mean_imbalance(100) < 1.1 < first.mean_imbalance(100, balanced=False)
