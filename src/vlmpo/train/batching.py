"""Which pairs go to which optimizer step, rank, micro-batch and row.

The order is a pure function of seed and epoch. An optimizer step takes the next ``global batch`` pairs of that order,
however they are then split: the same pairs as 8x1, 4x2 or over two ranks make the same step. No pair is repeated to
even things out; a rank that runs short gets an empty micro-batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vlmpo.data.encode import EncodedPair, PairEncoder
from vlmpo.data.pixels import PixelScale
from vlmpo.data.records import PreferencePair
from vlmpo.errors import RecordError
from vlmpo.tree.layout import PromptTree, Row, build_row, pack


class PairBatchSampler(Sampler[list[int]]):
    """Micro-batches of pair indices for one rank.

    Args:
        num_pairs: pairs in the data set.
        per_device: pairs a micro-batch holds.
        accumulation: micro-batches an optimizer step takes.
        world_size, rank: of the data-parallel group.
        seed: of the order; None keeps the order of the data set.
        drop_last: leave out the last optimizer step of an epoch where it is not full.
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
    ) -> None:
        self.num_pairs = num_pairs
        self.per_device = per_device
        self.accumulation = accumulation
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.drop_last = drop_last
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
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.num_pairs, generator=generator).tolist()

    def __len__(self) -> int:
        full, rest = divmod(self.num_pairs, self.global_batch)
        rest = 0 if self.drop_last else rest
        return full * self.accumulation + math.ceil(rest / (self.per_device * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for start in range(0, self.num_pairs, self.global_batch):
            step = order[start : start + self.global_batch]
            if self.drop_last and len(step) < self.global_batch:
                return
            for micro in range(math.ceil(len(step) / (self.per_device * self.world_size))):
                at = (micro * self.world_size + self.rank) * self.per_device
                yield step[at : at + self.per_device]


class Unusable(NamedTuple):
    """A record that cannot be trained on: why, and the data set it belongs to."""

    error: RecordError
    source: str


class EncodedPairs(Dataset[Any]):
    """Pairs encoded on access, in the loader's workers. A bad record comes back as the error that says why."""

    def __init__(self, pairs: Any, encoder: PairEncoder) -> None:
        self.pairs = pairs
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> EncodedPair | Unusable:
        source = ""
        try:
            pair: PreferencePair = self.pairs[index]
            source = pair.source
            return self.encoder.encode(pair)
        except RecordError as error:
            return Unusable(error, source)


@dataclass(frozen=True)
class PairRows:
    """Pairs that are read in one forward and one backward pass: mostly one row, where trunks are not shared a few.

    Attributes:
        rows: the trees, laid out.
        chosen, rejected: ``[pairs]``, which branch of the rows (counted through) each pair's responses are;
            ``rejected`` is None in supervised fine-tuning.
        chosen_lengths: ``[pairs]``, scored tokens of the chosen responses.
        sources, origins: each pair's data set and ``file:line``.
    """

    rows: list[Row]
    chosen: Tensor
    rejected: Tensor | None
    chosen_lengths: Tensor
    sources: list[str]
    origins: list[str]

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def num_tokens(self) -> int:
        """Tokens read, each trunk counted once."""
        return sum(row.layout.num_tokens for row in self.rows)

    @property
    def num_branches(self) -> int:
        """Branches in all rows."""
        return sum(row.num_branches for row in self.rows)

    @property
    def branch_lengths(self) -> list[int]:
        """Scored tokens of each branch, counted through the rows."""
        return [length for row in self.rows for span in row.layout.spans for length in span.branches]

    def to(self, device: torch.device) -> PairRows:
        """The same with its tensors on ``device``."""
        return replace(
            self,
            rows=[row.to(device) for row in self.rows],
            chosen=self.chosen.to(device),
            rejected=None if self.rejected is None else self.rejected.to(device),
            chosen_lengths=self.chosen_lengths.to(device),
        )

    def with_pixels(self, scale: PixelScale | None) -> PairRows:
        """The same with pixels as the processor gives them, where they came as bytes (``scale`` of their encoder)."""
        if scale is None:
            return self
        return replace(self, rows=[replace(row, vision=scale.restored(row.vision)) for row in self.rows])


@dataclass(frozen=True)
class MicroBatch:
    """What one training step reads on one rank: parts, each with its own backward pass, and what could not be used."""

    parts: list[PairRows]
    dropped: list[Unusable] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def num_chosen_tokens(self) -> int:
        """Scored tokens of all chosen responses."""
        return sum(int(part.chosen_lengths.sum()) for part in self.parts)


def merge(parts: Sequence[PairRows]) -> PairRows:
    """All pairs of ``parts`` (at least one) to be read in one pass."""
    if len(parts) == 1:
        return parts[0]
    offsets = [0, *itertools.accumulate(part.num_branches for part in parts)]
    chosen = [part.chosen + offset for part, offset in zip(parts, offsets, strict=False)]
    rejected = [part.rejected + o for part, o in zip(parts, offsets, strict=False) if part.rejected is not None]
    return PairRows(
        rows=[row for part in parts for row in part.rows],
        chosen=torch.cat(chosen),
        rejected=torch.cat(rejected) if rejected else None,
        chosen_lengths=torch.cat([part.chosen_lengths for part in parts]),
        sources=[source for part in parts for source in part.sources],
        origins=[origin for part in parts for origin in part.origins],
    )


def lay_out(pairs: Sequence[EncodedPair], shared: bool = True) -> PairRows:
    """Put encoded pairs (possibly none) into one row, or each response into a row of its own."""
    trees = [_tree(pair) for pair in pairs]
    branches = len(trees[0].branches) if trees else 2
    first = torch.arange(len(pairs)) * branches
    if shared:
        rows = [build_row(trees)] if trees else []
    else:
        rows = [build_row([part]) for tree in trees for part in tree.separate()]
    return PairRows(
        rows=rows,
        chosen=first,
        rejected=first + 1 if branches == 2 else None,
        chosen_lengths=torch.tensor([pair.chosen_ids.numel() for pair in pairs], dtype=torch.long),
        sources=[pair.source for pair in pairs],
        origins=[pair.origin for pair in pairs],
    )


class Collator:
    """Encoded pairs to a MicroBatch.

    Args:
        max_tokens_per_row: bound of a row; None: one row a micro-batch.
        shared: whether the branches of a pair share their trunk, or each gets a row of its own (a part is then a pair).
    """

    def __init__(self, max_tokens_per_row: int | None, shared: bool) -> None:
        self.max_tokens_per_row = max_tokens_per_row
        self.shared = shared

    def __call__(self, items: Sequence[EncodedPair | Unusable]) -> MicroBatch:
        pairs = [item for item in items if isinstance(item, EncodedPair)]
        if self.shared:
            groups = pack([_tree(pair) for pair in pairs], self.max_tokens_per_row)
        else:
            groups = [[index] for index in range(len(pairs))]
        # A rank without pairs still reads one empty part: it must join the others' collectives.
        parts = [lay_out([pairs[i] for i in group], self.shared) for group in groups] or [lay_out([])]
        return MicroBatch(parts, [item for item in items if isinstance(item, Unusable)])


def _tree(pair: EncodedPair) -> PromptTree:
    branches = (pair.chosen_ids,) if pair.rejected_ids is None else (pair.chosen_ids, pair.rejected_ids)
    return PromptTree(pair.trunk_ids, branches, pair.vision, pair.token_types)


class PairLoader(DataLoader[MicroBatch]):
    """A DataLoader whose order follows the epoch, also before any wrapper is around it."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        sampler = self.batch_sampler
        assert isinstance(sampler, PairBatchSampler)
        sampler.set_epoch(epoch)
