"""Which pairs go to which optimizer step, rank, micro-batch and row.

The order is a pure function of seed and epoch. An optimizer step takes the next ``global batch`` pairs of that order,
however they are then split: the same pairs as 8x1, 4x2 or over two ranks make the same step. Ranks share them so that
they have equal work, where costs say what that is (:mod:`vlmpo.train.balance`). No pair is repeated to even things out;
a rank that runs short gets an empty micro-batch.
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

from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.encode.pixels import PixelScale
from vlmpo.data.records import PreferencePair
from vlmpo.errors import RecordError
from vlmpo.train.balance import PairCosts, Shape, even_split, lag, plain_split
from vlmpo.train.logps_store import content_key
from vlmpo.train.order import runs, shuffled, with_groups
from vlmpo.tree.layout import PackedRow, PromptTree, build_row, pack


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
        name = getattr(self.pairs, "source", None)  # where a data set tells it without reading the record
        source = name(index) if callable(name) else ""
        try:
            pair: PreferencePair = self.pairs[index]
            source = pair.source
            return self.encoder.encode(pair)
        except RecordError as error:
            return Unusable(error, source)


@dataclass(frozen=True)
class MicroBatch:
    """Pairs that are read in one forward and one backward pass: mostly one row, where prompts are not shared a few.

    Attributes:
        rows: the trees, laid out.
        chosen, rejected: ``[pairs]``, which response of the rows (counted through) each pair's responses are;
            ``rejected`` is None in supervised fine-tuning.
        chosen_lengths: ``[pairs]``, scored tokens of the chosen responses.
        sources, origins: each pair's data set and ``file:line``.
        keys: what each response's log-prob depends on in the data, as a hash: its prompt, images and tokens. Empty
            where nobody asks.
    """

    rows: list[PackedRow]
    chosen: Tensor
    rejected: Tensor | None
    chosen_lengths: Tensor
    sources: list[str]
    origins: list[str]
    keys: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def num_tokens(self) -> int:
        """Tokens read for the pairs, each prompt counted once."""
        return sum(row.layout.num_tokens - row.dummy_tokens for row in self.rows)

    @property
    def num_responses(self) -> int:
        """Responses in all rows."""
        return sum(row.num_responses for row in self.rows)

    @property
    def response_lengths(self) -> list[int]:
        """Scored tokens of each response, counted through the rows."""
        return [int(n) for row in self.rows for n in torch.bincount(row.response_index, minlength=row.num_responses)]

    def to(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on ``device``."""
        return replace(
            self,
            rows=[row.to(device) for row in self.rows],
            chosen=self.chosen.to(device),
            rejected=None if self.rejected is None else self.rejected.to(device),
            chosen_lengths=self.chosen_lengths.to(device),
        )

    def with_pixels(self, scale: PixelScale | None) -> MicroBatch:
        """The same with pixels as the processor gives them, where they came as bytes (``scale`` of their encoder)."""
        if scale is None:
            return self
        return replace(self, rows=[replace(row, vision=scale.normalise(row.vision)) for row in self.rows])


@dataclass(frozen=True)
class Batch:
    """What one training step reads on one rank: parts, each with its own backward pass, and what could not be used."""

    parts: list[MicroBatch]
    dropped: list[Unusable] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def num_chosen_tokens(self) -> int:
        """Scored tokens of all chosen responses."""
        return sum(int(part.chosen_lengths.sum()) for part in self.parts)


def merge(parts: Sequence[MicroBatch]) -> MicroBatch:
    """All pairs of ``parts`` (at least one) to be read in one pass."""
    if len(parts) == 1:
        return parts[0]
    offsets = [0, *itertools.accumulate(part.num_responses for part in parts)]
    chosen = [part.chosen + offset for part, offset in zip(parts, offsets, strict=False)]
    rejected = [part.rejected + o for part, o in zip(parts, offsets, strict=False) if part.rejected is not None]
    return MicroBatch(
        rows=[row for part in parts for row in part.rows],
        chosen=torch.cat(chosen),
        rejected=torch.cat(rejected) if rejected else None,
        chosen_lengths=torch.cat([part.chosen_lengths for part in parts]),
        sources=[source for part in parts for source in part.sources],
        origins=[origin for part in parts for origin in part.origins],
        keys=[key for part in parts for key in part.keys],
    )


def lay_out(pairs: Sequence[EncodedPair], shared: bool = True, keyed: bool = False, group: int = 1) -> MicroBatch:
    """Put encoded pairs (possibly none) into one row, or each response into a row of its own.

    Args:
        pairs: in order.
        shared: whether responses share their prompt's prompt.
        keyed: whether responses get their keys.
        group: how many pairs of one prompt, next to each other in ``pairs``, may be one tree.
    """
    grown = [_grow(members) for members in grouped(pairs, group)]
    trees = [tree for tree, _, _ in grown]
    firsts = [0, *itertools.accumulate(len(tree.responses) for tree in trees)]
    chosen = [first + at for first, (_, found, _) in zip(firsts, grown, strict=False) for at in found]
    rejected = [first + at for first, (_, _, found) in zip(firsts, grown, strict=False) for at in found]
    if shared:
        rows = [build_row(trees)] if trees else []
    else:
        rows = [build_row([part]) for tree in trees for part in tree.separate()]
    return MicroBatch(
        rows=rows,
        chosen=torch.tensor(chosen, dtype=torch.long),
        rejected=torch.tensor(rejected, dtype=torch.long) if rejected or not pairs else None,
        chosen_lengths=torch.tensor([pair.chosen_ids.numel() for pair in pairs], dtype=torch.long),
        sources=[pair.source for pair in pairs],
        origins=[pair.origin for pair in pairs],
        keys=[key for tree in trees for key in response_keys(tree)] if keyed else [],
    )


def grouped(pairs: Sequence[EncodedPair], most: int) -> list[list[EncodedPair]]:
    """Pairs next to each other with the same prompt and images, up to ``most`` of them, as one group."""
    return runs(pairs, most, _same_prompt)


def _same_prompt(one: EncodedPair, other: EncodedPair) -> bool:
    """By what the model reads: token ids, their types, pixels."""
    mine, theirs = ({"": pair.prompt_ids, **pair.vision, **pair.token_types} for pair in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _grow(pairs: Sequence[EncodedPair]) -> tuple[PromptTree, list[int], list[int]]:
    """Build one tree of pairs with one prompt; say whose response is which. Equal responses are held once."""
    found: dict[tuple[int, ...], int] = {}
    responses: list[Tensor] = []

    def response(ids: Tensor) -> int:
        at = found.setdefault(tuple(ids.tolist()), len(responses))
        if at == len(responses):
            responses.append(ids)
        return at

    chosen, rejected = [], []
    for pair in pairs:
        chosen.append(response(pair.chosen_ids))
        if pair.rejected_ids is not None:
            rejected.append(response(pair.rejected_ids))
    first = pairs[0]
    return PromptTree(first.prompt_ids, tuple(responses), first.vision, first.token_types), chosen, rejected


def response_keys(tree: PromptTree) -> list[bytes]:
    """Hash each response's content: the prompt's tokens and images as the model reads them, its own tokens."""
    named = sorted({**tree.vision, **tree.token_types}.items())
    told = [f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() for name, tensor in named]
    prompt = content_key(_bytes_of(tree.prompt_ids), *told, *(_bytes_of(tensor) for _, tensor in named))
    return [content_key(prompt, _bytes_of(response)) for response in tree.responses]


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


class Collator:
    """Encoded pairs to a Batch.

    Args:
        max_tokens_per_row: bound of a row; None: one row a micro-batch.
        shared: whether the responses of a pair share their prompt, or each gets a row of its own (a part is then a
        pair). keyed: whether responses get their keys.
        group: how many pairs of one prompt may share a prompt.
    """

    def __init__(self, max_tokens_per_row: int | None, shared: bool, keyed: bool = False, group: int = 1) -> None:
        self.max_tokens_per_row = max_tokens_per_row
        self.shared = shared
        self.keyed = keyed
        self.group = max(1, group)

    def __call__(self, items: Sequence[EncodedPair | Unusable]) -> Batch:
        groups = grouped([item for item in items if isinstance(item, EncodedPair)], self.group)
        if self.shared:
            parts = pack([_grow(members)[0] for members in groups], self.max_tokens_per_row)
        else:
            parts = [[index] for index in range(len(groups))]
        # Without pairs there is still one part, of no rows: a step is a forward and a backward pass.
        laid_out = [self._lay_out([pair for index in part for pair in groups[index]]) for part in parts or [[]]]
        return Batch(laid_out, [item for item in items if isinstance(item, Unusable)])

    def _lay_out(self, pairs: Sequence[EncodedPair]) -> MicroBatch:
        return lay_out(pairs, self.shared, self.keyed, self.group)


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
