"""Decide which pairs make an optimizer step, and which rank and micro-batch reads each of them.

The order of an epoch is a pure function of the seed, the epoch and the data. A step takes the next pairs of that order,
however they are then split: 8 micro-batches of 1 pair, 4 of 2 and two ranks of 4 make the same step. No pair is
repeated to fill a step up; a rank without enough pairs gets an empty micro-batch.

With costs (:mod:`vlmpo.train.lengths`) the pairs of a step are shared out so that all ranks have equal work. Every
rank computes the same split for itself. Inside a rank the costliest pairs come first: the k-th micro-batches of all
ranks then cost nearly the same, and a step that is too large for the memory fails at once.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from vlmpo.errors import RecordError
from vlmpo.hashing import content_key

Item = TypeVar("Item")
Split = list[list[list[int]]]  # pairs by rank and micro-batch


# ---- order ----


def shuffle(num_pairs: int, *, seed: int, epoch: int) -> list[int]:
    """Return all indices below ``num_pairs`` in the random order of this seed and epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_pairs, generator=generator).tolist()


def prompt_keys(pairs: Any) -> list[bytes]:
    """Return 16 bytes for each pair, equal if text and media of the prompts are equal.

    Reads every record once, but opens no image file. A record that cannot be read gets a key of its own.
    """
    keys = []
    for index in range(len(pairs)):
        try:
            pair = pairs[index]
        except RecordError:
            keys.append(content_key(b"unreadable", b"%d" % index))
            continue
        texts = itertools.chain.from_iterable((message.role, message.text) for message in pair.prompt)
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        for kind, media in ((b"image", pair.images), (b"video", pair.videos)):
            for medium in media:
                if isinstance(medium, str | os.PathLike):
                    content = os.fsencode(medium)
                else:
                    content = medium if isinstance(medium, bytes) else medium.tobytes()
                parts += [kind, content]
        keys.append(content_key(*parts))
    return keys


def bring_prompts_together(order: Sequence[int], keys: Sequence[bytes], max_group: int) -> list[int]:
    """Return ``order`` with pairs of one prompt next to each other, up to ``max_group`` at a time.

    A group takes the place of its first pair. So which pairs are together, and where in the epoch, is as random as
    ``order``, and every pair is still read once.
    """
    open_groups: dict[bytes, list[int]] = {}
    groups: list[list[int]] = []
    for index in order:
        group = open_groups.get(keys[index])
        if group is None or len(group) == max_group:
            group = open_groups[keys[index]] = []
            groups.append(group)
        group.append(index)
    return [index for group in groups for index in group]


def split_runs(items: Sequence[Item], max_run: int, same: Callable[[Item, Item], bool]) -> list[list[Item]]:
    """Cut ``items`` into runs of up to ``max_run`` neighbours that are the ``same`` as the first of their run."""
    runs: list[list[Item]] = []
    for item in items:
        if runs and len(runs[-1]) < max_run and same(runs[-1][0], item):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def explain_small_micro_batch(max_group: int, per_device: int) -> str | None:
    """Return a note if micro-batches of ``per_device`` pairs are too small for ``max_group`` pairs of one prompt."""
    if max_group <= max(1, per_device):
        return None
    have = "no two pairs" if per_device == 1 else f"only {per_device} pairs"
    return (
        f"data.group_by_prompt is {max_group}, but {have} of a prompt can share its prompt: a micro-batch holds "
        f"{per_device}; raise training.per_device_train_batch_size (the memory is bounded by max_tokens_per_row)"
    )


# ---- ranks ----


class PairCosts(NamedTuple):
    """Holds the work of reading each pair, in tokens of the text model.

    Attributes:
        pair: int32 [pairs], work of the pair by itself; 0 if it cannot be used.
        prompt: int32 [pairs], the part of it that is saved if the pair shares the prompt of another pair.
    """

    pair: NDArray[np.int32]
    prompt: NDArray[np.int32]

    def of_group(self, group: Sequence[int]) -> int:
        """Return the work of reading pairs of one prompt together."""
        return sum(int(self.pair[pair]) for pair in group) - sum(int(self.prompt[pair]) for pair in group[1:])


def deal_out(step: Sequence[int], *, num_ranks: int, per_device: int) -> Split:
    """Split a step in order: the first micro-batch of each rank, then the second.

    All ranks get equally many micro-batches, some of them empty if the step is short.
    """
    starts = range(0, len(step), num_ranks * per_device)
    by_rank = [[start + rank * per_device for start in starts] for rank in range(num_ranks)]
    return [[list(step[first : first + per_device]) for first in firsts] for firsts in by_rank]


def balance_ranks(groups: Sequence[list[int]], *, costs: PairCosts, num_ranks: int, per_device: int) -> Split:
    """Split a step so that the costs of its ranks are nearly equal, with as many micro-batches as :func:`deal_out`.

    Greedy: the costliest group goes first, to the rank with the least cost among those that have room for it.

    Args:
        groups: the pairs of the step, those of one prompt together; a group is divided only if no rank has room for
            all of it, and in a rank only if no micro-batch has.
        costs: of all pairs of the data set.
        num_ranks: data-parallel ranks.
        per_device: pairs in a micro-batch, at most.
    """
    step = list(itertools.chain.from_iterable(groups))
    num_micro_batches = math.ceil(len(step) / (num_ranks * per_device))
    shares: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    loads = np.zeros(num_ranks)
    room = np.full(num_ranks, per_device * num_micro_batches)
    waiting = deque(sorted(groups, key=costs.of_group, reverse=True))
    while waiting:
        group = waiting.popleft()
        has_room = room >= len(group)
        rank = int(np.where(has_room if has_room.any() else room > 0, loads, np.inf).argmin())
        group, rest = group[: room[rank]], group[room[rank] :]
        if rest:
            waiting.appendleft(rest)
        shares[rank].append(group)
        loads[rank] += costs.of_group(group)
        room[rank] -= len(group)
    if len(groups) == len(step):  # without groups: on few pairs greed may do worse than chance
        dealt = deal_out(step, num_ranks=num_ranks, per_device=per_device)
        in_order = [[[pair] for batch in rank for pair in batch] for rank in dealt]
        if max(sum(map(costs.of_group, share)) for share in in_order) < loads.max():
            shares = in_order
    return [_fill_micro_batches(share, costs, per_device, num_micro_batches) for share in shares]


def _fill_micro_batches(
    share: Sequence[list[int]], costs: PairCosts, per_device: int, num_micro_batches: int
) -> list[list[int]]:
    """Put each group, the costliest per pair first, into the first micro-batch with room; divide it if none has."""
    batches: list[list[int]] = [[] for _ in range(num_micro_batches)]
    divided: list[int] = []
    for group in sorted(share, key=lambda group: costs.of_group(group) / len(group), reverse=True):
        with_room = (batch for batch in batches if len(batch) + len(group) <= per_device)
        next(with_room, divided).extend(group)
    for pair in divided:
        next(batch for batch in batches if len(batch) < per_device).append(pair)
    return batches


# ---- batches ----


@dataclass(kw_only=True, eq=False)
class PairBatchSampler(Sampler[list[int]]):
    """Yields the micro-batches of one rank, as lists of pair indices.

    Attributes:
        num_pairs: pairs in the data set.
        per_device: pairs in a micro-batch.
        accumulation: micro-batches in an optimizer step, on each rank.
        num_ranks, rank: number of data-parallel ranks, and this one.
        seed: seed of the order; None keeps the order of the data set.
        drop_last: whether to leave out the last optimizer step of an epoch if it is not full.
        keys: the prompt of each pair (see :func:`prompt_keys`), to bring pairs of one prompt together; else None.
        max_group: most pairs of one prompt that are brought together.
        costs: costs of each pair, to balance the ranks; None deals the pairs of a step out in order.
        epoch: the epoch whose order is yielded next.
        last_epoch: the epoch that an iteration goes on to; None, and any that is past, stand for ``epoch``.
    """

    num_pairs: int
    per_device: int
    accumulation: int = 1
    num_ranks: int = 1
    rank: int = 0
    seed: int | None = None
    drop_last: bool = False
    keys: Sequence[bytes] | None = None
    max_group: int = 1
    costs: PairCosts | None = None
    epoch: int = 0
    last_epoch: int | None = None

    def __len__(self) -> int:
        full, rest = divmod(self.num_pairs, self.global_batch)
        rest = 0 if self.drop_last else rest
        return full * self.accumulation + math.ceil(rest / (self.per_device * self.num_ranks))

    def __iter__(self) -> Iterator[list[int]]:
        last = self.epoch if self.last_epoch is None else self.last_epoch
        return self._batches(range(self.epoch, max(self.epoch, last) + 1))

    def _batches(self, epochs: Iterable[int]) -> Iterator[list[int]]:
        for epoch in epochs:
            for step in self.steps(epoch):
                yield from self.split(step)[self.rank]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is yielded next.

        transformers calls it on a resume in the middle of an epoch, for which accelerate wraps this sampler.
        """
        self.epoch = epoch

    @property
    def global_batch(self) -> int:
        """Pairs in an optimizer step, over all ranks and micro-batches."""
        return self.per_device * self.accumulation * self.num_ranks

    def steps(self, epoch: int | None = None) -> Iterator[list[int]]:
        """Yield the pairs of each optimizer step of ``epoch``, None: the one that is next, over all ranks."""
        order = list(range(self.num_pairs))
        if self.seed is not None:
            order = shuffle(self.num_pairs, seed=self.seed, epoch=self.epoch if epoch is None else epoch)
            if self.keys is not None:
                order = bring_prompts_together(order, self.keys, self.max_group)
        end = self.num_pairs // self.global_batch * self.global_batch if self.drop_last else self.num_pairs
        for start in range(0, end, self.global_batch):
            yield order[start : start + self.global_batch]

    def split(self, step: Sequence[int], balanced: bool = True) -> Split:
        """Split a step over ranks and micro-batches, by costs if there are any and ``balanced`` is set."""
        shape = {"num_ranks": self.num_ranks, "per_device": self.per_device}
        if self.costs is None or not balanced:
            return deal_out(step, **shape)
        return balance_ranks(self.groups(step), costs=self.costs, **shape)

    def groups(self, pairs: Sequence[int]) -> list[list[int]]:
        """Cut ``pairs`` into groups that are read together: neighbours of one prompt."""
        keys = self.keys
        return split_runs(pairs, self.max_group, lambda one, other: keys is not None and keys[one] == keys[other])

    def mean_imbalance(self, num_steps: int, balanced: bool = True) -> float:
        """Return the cost of the costliest rank divided by the mean cost of a rank; 1 if all are equal.

        It is averaged over the first ``num_steps`` optimizer steps of the epoch, ``balanced`` by costs or dealt out in
        order.
        """
        assert self.costs is not None
        ratios = []
        for step in itertools.islice(self.steps(), num_steps):
            loads = [
                sum(self.costs.of_group(group) for batch in rank for group in self.groups(batch))
                for rank in self.split(step, balanced)
            ]
            ratios.append(max(loads) * len(loads) / sum(loads) if any(loads) else 1.0)
        return sum(ratios) / len(ratios)


class PairLoader(DataLoader[Any]):
    """Loads the batches of one rank, in the order of its :class:`PairBatchSampler`.

    With workers it reads ahead over the end of an epoch: while its last batches are trained on, the first ones of the
    next are made. A small data set would otherwise be waited for once an epoch.

    Attributes:
        last_epoch: the last one that is read ahead; None reads none ahead.
    """

    last_epoch: int | None = None
    _ahead: Iterator[Any] | None = None  # batches of this epoch and those after it
    _due = (0, 0)  # epoch and number of the next of them

    def __iter__(self) -> Any:
        last = self.last_epoch
        return super().__iter__() if self.num_workers == 0 or last is None else self._read_on(last)

    def _read_on(self, last_epoch: int) -> Iterator[Any]:
        """Yield the batches of an epoch; those that an earlier epoch's iteration has made ready first."""
        sampler, epoch = self.pair_sampler, self.pair_sampler.epoch
        if self._ahead is None or self._due != (epoch, 0):
            self._ahead = None  # of an epoch that was left: its workers end before others start
            sampler.last_epoch = last_epoch
            try:
                self._ahead = super().__iter__()
            finally:  # whoever else reads the sampler, as a resumed run does, wants one epoch
                sampler.last_epoch = None
        for number in range(len(self)):
            self._due = (epoch, number + 1)
            yield next(self._ahead)
        self._due = (epoch + 1, 0)
        if epoch >= last_epoch:
            self._ahead = None

    def close(self) -> None:
        """End the workers now.

        The garbage collector closes their queues before it tells them to end, and then waits five seconds for each.
        """
        self._ahead = None
        self._iterator = None  # torch's, of persistent workers

    @property
    def pair_sampler(self) -> PairBatchSampler:
        """The sampler of its pairs."""
        assert isinstance(self.batch_sampler, PairBatchSampler)
        return self.batch_sampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is yielded next."""
        self.pair_sampler.set_epoch(epoch)
