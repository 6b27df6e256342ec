"""Stand-in until the sampler is merged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader, Sampler

from vlmpo.train.balance import PairCosts, Shape, even_split, lag, plain_split
from vlmpo.train.batching import Batch
from vlmpo.train.order import shuffled, with_groups


class PairBatchSampler(Sampler[list[int]]):
    """Micro-batches of pair indices for one rank.

    Args:
        num_pairs: pairs in the data set.
        per_device: pairs a micro-batch holds.
        accumulation: micro-batches an optimizer step takes.
        world_size, rank: of the data-parallel group.
        seed: of the order; None keeps the order of the data set.
        drop_last: leave out the last optimizer step of an epoch where it is not full.
        labels: of each pair's prompt, where pairs of one prompt are to come together; else None.
        group: how many of them at a time.
        costs: of each pair, where ranks are to have equal work; None: they take a step's pairs in order.
    """

    def __init__(
        self,
        num_pairs: int,
        per_device: int,
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int | None,
        drop_last: bool = False,
        labels: Sequence[bytes] | None = None,
        group: int = 1,
        costs: PairCosts | None = None,
    ) -> None:
        self.num_pairs = num_pairs
        self.per_device = per_device
        self.accumulation = accumulation
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.drop_last = drop_last
        self.labels = labels
        self.group = group
        self.costs = costs
        self.epoch = 0

    @property
    def global_batch(self) -> int:
        """Pairs an optimizer step takes over all ranks and micro-batches."""
        return self.per_device * self.accumulation * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        self.epoch = epoch

    def order(self) -> list[int]:
        """All pair indices in this epoch's order."""
        if self.seed is None:
            return list(range(self.num_pairs))
        order = shuffled(self.num_pairs, self.seed, self.epoch)
        return order if self.labels is None else with_groups(order, self.labels, self.group)

    def __len__(self) -> int:
        full, rest = divmod(self.num_pairs, self.global_batch)
        rest = 0 if self.drop_last else rest
        return full * self.accumulation + math.ceil(rest / (self.per_device * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps():
            split = plain_split(step, self._shape) if self.costs is None else even_split(step, self._shape, self.costs)
            yield from split[self.rank]

    @property
    def _shape(self) -> Shape:
        return Shape(self.world_size, self.per_device, self.labels, self.group)

    def _steps(self) -> Iterator[list[int]]:
        """The pairs of each optimizer step, over all ranks."""
        order = self.order()
        for start in range(0, self.num_pairs, self.global_batch):
            step = order[start : start + self.global_batch]
            if self.drop_last and len(step) < self.global_batch:
                return
            yield step

    def lags(self, steps: int) -> tuple[float, float] | None:
        """The heaviest rank's work over the mean of all, as it is shared out and as it would be in plain order.

        Both are means over the epoch's first ``steps`` optimizer steps; None without costs, or without a step.
        """
        found = []
        for step in itertools.islice(self._steps(), 0 if self.costs is None else steps):
            assert self.costs is not None
            splits = even_split(step, self._shape, self.costs), plain_split(step, self._shape)
            found.append([lag(split, self._shape, self.costs) for split in splits])
        if not found:
            return None
        even, plain = (sum(values) / len(found) for values in zip(*found, strict=True))
        return even, plain


class PairLoader(DataLoader[Batch]):
    """A DataLoader whose order follows the epoch, also before any wrapper is around it."""

    @property
    def sampler_of_pairs(self) -> PairBatchSampler:
        """Says which pairs come when."""
        assert isinstance(self.batch_sampler, PairBatchSampler)
        return self.batch_sampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        self.sampler_of_pairs.set_epoch(epoch)
