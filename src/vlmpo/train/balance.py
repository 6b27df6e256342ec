"""An optimizer step's pairs shared out to ranks and micro-batches, so that all ranks have equal work.

Which pairs make a step is settled before and does not change here. The result is a pure function of the step and of the
costs, so every rank works out the same one for itself. Inside a rank the heaviest pairs come first: the k-th
micro-batches of all ranks weigh alike, and a step that is too large for the memory fails at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmpo.train.order import runs

Split = list[list[list[int]]]  # by rank, by micro-batch: pairs


class PairCosts(NamedTuple):
    """What reading a pair costs, in tokens of the text model's work.

    Attributes:
        whole: int32 [pairs], of the pair alone; 0 where it cannot be read.
        prompt: int32 [pairs], of that, what it saves where it shares another pair's prompt.
    """

    whole: NDArray[np.int32]
    prompt: NDArray[np.int32]

    def of(self, pairs: Sequence[int]) -> int:
        """Cost of pairs of one prompt that are read together."""
        return sum(int(self.whole[pair]) for pair in pairs) - sum(int(self.prompt[pair]) for pair in pairs[1:])


class Shape(NamedTuple):
    """How a step is split.

    Attributes:
        ranks: of the data-parallel group.
        per_device: pairs a micro-batch holds at most.
        labels: of each pair's prompt, where pairs of one prompt are to stay together; else None.
        group: how many of them at a time.
    """

    ranks: int
    per_device: int
    labels: Sequence[bytes] | None = None
    group: int = 1

    def units(self, pairs: Sequence[int]) -> list[list[int]]:
        """``pairs`` cut into those that are read together: they stand next to each other and have one prompt."""
        return runs(pairs, self.group, self._alike)

    def _alike(self, one: int, other: int) -> bool:
        return self.labels is not None and self.labels[one] == self.labels[other]


def plain_split(step: Sequence[int], shape: Shape) -> Split:
    """In order: the first micro-batch of each rank, then the second. All ranks have equally many, some empty."""
    size = shape.per_device
    starts = range(0, len(step), shape.ranks * size)
    firsts = [[start + rank * size for start in starts] for rank in range(shape.ranks)]
    return [[list(step[first : first + size]) for first in by_rank] for by_rank in firsts]


def even_split(step: Sequence[int], shape: Shape, costs: PairCosts) -> Split:
    """As :func:`plain_split`, with ranks' costs as near to each other as a greedy search brings them.

    Pairs of one prompt that stand together stay together wherever some rank, and there a micro-batch, has room.
    """
    plain = plain_split(step, shape)
    micro_batches = len(plain[0])
    units = [_Unit(costs.of(pairs), pairs) for pairs in shape.units(step)]
    ranks = _over_ranks(units, shape, costs, micro_batches)
    if len(units) == len(step):  # all by themselves: on few pairs greed may do worse than chance
        by_chance = [[_Unit(costs.of([p]), [p]) for batch in rank for p in batch] for rank in plain]
        ranks = min(ranks, by_chance, key=lambda split: max(sum(unit.cost for unit in rank) for rank in split))
    return [_over_micro_batches(rank, shape.per_device, micro_batches) for rank in ranks]


def lag(split: Split, shape: Shape, costs: PairCosts) -> float:
    """The heaviest rank's cost over the mean of all; 1 where they are equal."""
    loads = [sum(costs.of(pairs) for batch in rank for pairs in shape.units(batch)) for rank in split]
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


class _Unit(NamedTuple):
    cost: int
    pairs: list[int]


def _over_ranks(units: Sequence[_Unit], shape: Shape, costs: PairCosts, micro_batches: int) -> list[list[_Unit]]:
    """The heaviest unit goes first, to the rank with the least cost among those that have room for it."""
    rooms = [shape.per_device * micro_batches] * shape.ranks
    ranks: list[list[_Unit]] = [[] for _ in rooms]
    open_ranks = [(0, rank) for rank in range(shape.ranks)]  # a heap of those with room: cost so far, rank
    waiting = sorted(units, key=lambda unit: -unit.cost)[::-1]  # from its end: heaviest first, then in order
    while waiting:
        unit = waiting.pop()
        narrow = []  # lighter ranks without room for all of it
        while open_ranks and rooms[open_ranks[0][1]] < len(unit.pairs):
            narrow.append(heapq.heappop(open_ranks))
        if open_ranks:
            cost, rank = heapq.heappop(open_ranks)
            ranks[rank].append(unit)
            rooms[rank] -= len(unit.pairs)
            if rooms[rank]:
                heapq.heappush(open_ranks, (cost + unit.cost, rank))
        else:
            room = rooms[narrow[0][1]]
            halves = unit.pairs[room:], unit.pairs[:room]
            waiting += [_Unit(costs.of(pairs), pairs) for pairs in halves]
        for entry in narrow:
            heapq.heappush(open_ranks, entry)
    return ranks


def _over_micro_batches(units: Sequence[_Unit], per_device: int, micro_batches: int) -> list[list[int]]:
    """The heaviest unit by pair goes first, into the first micro-batch with room; what finds none is divided."""
    batches: list[list[int]] = [[] for _ in range(micro_batches)]
    divided: list[int] = []
    for unit in sorted(units, key=lambda unit: -unit.cost / len(unit.pairs)):
        roomy = (batch for batch in batches if len(batch) + len(unit.pairs) <= per_device)
        next(roomy, divided).extend(unit.pairs)
    for pair in divided:
        next(batch for batch in batches if len(batch) < per_device).append(pair)
    return batches
