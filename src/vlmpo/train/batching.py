"""Collate encoded pairs into the rows that one rank reads in a training step, each prompt once for its responses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlmpo.data.encode.encoder import EncodedPair, Unusable
from vlmpo.hashing import content_key
from vlmpo.train.sampler import split_runs
from vlmpo.tree.layout import PackedRow, PromptTree, rows_of, trees_of
from vlmpo.tree.packing import RowBound, pack


@dataclass(frozen=True)
class MicroBatch:
    """Holds pairs that are read in one forward and backward pass: one row, or several if prompts are not shared.

    Attributes:
        rows: the prompts and their responses, laid out.
        chosen, rejected: ``[pairs]``, the index of each pair's responses, counted over all rows; ``rejected`` is None
            in supervised fine-tuning.
        chosen_lengths: ``[pairs]``, scored tokens of the chosen responses.
        sources, origins: each pair's data set and ``file:line``.
        keys: for each response a hash of the data that decide its log-prob (prompt, images, tokens); empty unless the
            collator is ``keyed``.
        groups: for each tree the place of its first pair in the batch and its number of pairs, which are consecutive.
    """

    rows: list[PackedRow]
    chosen: Tensor
    rejected: Tensor | None
    chosen_lengths: Tensor
    sources: list[str]
    origins: list[str]
    keys: list[bytes] = field(default_factory=list)
    groups: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sources)

    def pin_memory(self) -> MicroBatch:
        """Return the micro-batch in memory from which a CUDA device copies while it computes."""
        return replace(
            self,
            rows=[row.pin_memory() for row in self.rows],
            chosen=self.chosen.pin_memory(),
            rejected=None if self.rejected is None else self.rejected.pin_memory(),
            chosen_lengths=self.chosen_lengths.pin_memory(),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens read for the pairs, each prompt counted once and dummies left out."""
        return sum(row.layout.num_tokens - row.dummy_tokens for row in self.rows)

    @property
    def num_responses(self) -> int:
        """Responses in all rows."""
        return sum(row.num_responses for row in self.rows)

    @property
    def response_lengths(self) -> list[int]:
        """Scored tokens of each response, over all rows."""
        return [length for row in self.rows for length in row.response_lengths]


@dataclass(frozen=True)
class Batch:
    """Holds the micro-batches of one training step on one rank, and the records that cannot be used.

    ``notices`` are those of its pairs: a loader's worker can tell the user nothing itself. ``bound`` is that of its
    rows.
    """

    micro_batches: list[MicroBatch]
    dropped: list[Unusable] = field(default_factory=list)
    notices: dict[str, str] = field(default_factory=dict)
    bound: RowBound = field(default_factory=RowBound)

    def __len__(self) -> int:
        return sum(len(micro_batch) for micro_batch in self.micro_batches)

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory; torch's loader calls this if it is to pin."""
        return replace(self, micro_batches=[micro_batch.pin_memory() for micro_batch in self.micro_batches])

    @property
    def num_chosen_tokens(self) -> int:
        """Scored tokens of all chosen responses."""
        return sum(int(micro_batch.chosen_lengths.sum()) for micro_batch in self.micro_batches)


class PairName(NamedTuple):
    """Names a pair: its data set and ``file:line``."""

    source: str
    origin: str


class PromptGroup(NamedTuple):
    """Holds pairs of one prompt, their tree, and the index in it of each pair's chosen and rejected response.

    ``rejected`` is empty in supervised fine-tuning, ``keys`` unless responses have keys; ``place`` is that of its
    first pair in the batch.
    """

    pairs: list[PairName]
    tree: PromptTree
    chosen: list[int]
    rejected: list[int]
    keys: list[bytes]
    place: int


@dataclass
class Collator:
    """Turns encoded pairs into a Batch.

    Attributes:
        max_tokens_per_row: most tokens of a row; None: one row a batch. Only to make one.
        bound: what a row holds at most; may be set later.
        shared: whether a prompt is read once for its responses. If not, each response gets a row of its own, and the
            pairs of one prompt are a micro-batch.
        keyed: whether micro-batches get the keys of their responses.
        group: most pairs that share one prompt.
    """

    max_tokens_per_row: InitVar[int | None]
    shared: bool
    keyed: bool = False
    group: int = 1
    bound: RowBound = field(init=False)

    def __post_init__(self, max_tokens_per_row: int | None) -> None:
        self.bound = RowBound(max_tokens_per_row)

    def __call__(self, items: Sequence[EncodedPair | Unusable]) -> Batch:
        pairs = [item for item in items if isinstance(item, EncodedPair)]
        runs = split_runs(
            range(len(pairs)), max(1, self.group), lambda one, other: _same_prompt(pairs[one], pairs[other])
        )
        groups = [_group([pairs[index] for index in indices], indices[0], self.keyed) for indices in runs]
        notices = {kind: remark for pair in pairs for kind, remark in pair.notices.items()}
        dropped = [item for item in items if isinstance(item, Unusable)]
        return Batch(self._micro_batches(groups), dropped, notices, self.bound)

    def again(self, batch: Batch) -> Batch:
        """Return ``batch``, which another bound was set for, as it would be under this one."""
        if batch.bound == self.bound:
            return batch
        groups = [group for part in batch.micro_batches for group in groups_of(part, self.shared)]
        groups.sort(key=lambda group: group.place)
        return replace(batch, micro_batches=self._micro_batches(groups), bound=self.bound)

    def halved(self, micro_batch: MicroBatch) -> list[MicroBatch]:
        """Return the pairs of ``micro_batch``, which is on the host, in two or more; in one if it is a single pair."""
        groups = groups_of(micro_batch, self.shared)
        if len(groups) == 1:
            groups = _divided(groups[0])
        size = -(-len(groups) // 2) if self.shared else 1
        return [_micro_batch(groups[at : at + size], self.shared) for at in range(0, len(groups), size)]

    def _micro_batches(self, groups: Sequence[PromptGroup]) -> list[MicroBatch]:
        """Lay groups, in the order of a batch, out in rows."""
        most, cost = self.bound.most, self.bound.cost
        if self.bound.divide and most is not None:
            parts = [_divided(group) if cost(group.tree) > most else [group] for group in groups]
            groups = list(itertools.chain.from_iterable(parts))
        if self.shared:
            packed = pack([group.tree for group in groups], most, cost)
        else:
            packed = [[index] for index in range(len(groups))]
        # Without pairs there is still one micro-batch, of no rows: a step is a forward and a backward pass.
        return [_micro_batch([groups[index] for index in indices], self.shared) for indices in packed or [[]]]


def _group(members: Sequence[EncodedPair], place: int, keyed: bool) -> PromptGroup:
    """Put pairs of one prompt together; a response that several of them have is read once."""
    position: dict[tuple[int, ...], int] = {}
    responses: list[Tensor] = []
    chosen: list[int] = []
    rejected: list[int] = []
    for pair in members:
        for ids, positions in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
            if ids is None:
                continue
            at = position.setdefault(tuple(ids.tolist()), len(responses))
            if at == len(responses):
                responses.append(ids)
            positions.append(at)
    tree = PromptTree(members[0].prompt_ids, tuple(responses), members[0].vision, members[0].token_types)
    pairs = [PairName(pair.source, pair.origin) for pair in members]
    return PromptGroup(pairs, tree, chosen, rejected, response_keys(tree) if keyed else [], place)


def _divided(group: PromptGroup) -> list[PromptGroup]:
    """Return each pair of ``group`` as a group of its own."""
    parts = []
    for at, pair in enumerate(group.pairs):
        used = list(dict.fromkeys([group.chosen[at], *group.rejected[at : at + 1]]))
        tree = replace(group.tree, responses=tuple(group.tree.responses[index] for index in used))
        rejected = [used.index(index) for index in group.rejected[at : at + 1]]
        keys = [group.keys[index] for index in used] if group.keys else []
        parts.append(PromptGroup([pair], tree, [0], rejected, keys, group.place + at))
    return parts


def _micro_batch(groups: Sequence[PromptGroup], shared: bool) -> MicroBatch:
    trees = [group.tree for group in groups]
    offsets = [0, *itertools.accumulate(len(tree.responses) for tree in trees)]
    numbered = list(zip(groups, offsets, strict=False))
    pairs = [pair for group in groups for pair in group.pairs]
    chosen = [(group.tree.responses[at].numel(), offset + at) for group, offset in numbered for at in group.chosen]
    rejected = [offset + at for group, offset in numbered for at in group.rejected]
    return MicroBatch(
        rows=rows_of(trees, shared),
        chosen=_indices([at for _, at in chosen]),
        rejected=_indices(rejected) if rejected or not pairs else None,
        chosen_lengths=_indices([length for length, _ in chosen]),
        sources=[pair.source for pair in pairs],
        origins=[pair.origin for pair in pairs],
        keys=[key for group in groups for key in group.keys],
        groups=[(group.place, len(group.pairs)) for group in groups],
    )


def groups_of(micro_batch: MicroBatch, shared: bool) -> list[PromptGroup]:
    """Return the groups that a micro-batch on the host was laid out from; none for one that holds only dummies.

    Needed only if it turns out too large to be read; its rows are taken apart for that.

    Args:
        micro_batch: from a :class:`Collator`.
        shared: whether its rows share prompts; if not, it is of one group.
    """
    if not len(micro_batch):
        return []
    trees = [tree for row in micro_batch.rows for tree in trees_of(row)]
    if not shared:
        trees = [replace(trees[0], responses=tuple(tree.responses[0] for tree in trees))]
    groups: list[PromptGroup] = []
    pair = response = 0
    chosen = micro_batch.chosen.tolist()
    rejected = None if micro_batch.rejected is None else micro_batch.rejected.tolist()
    for (place, count), tree in zip(micro_batch.groups, trees, strict=True):
        of_pairs, of_tree = slice(pair, pair + count), slice(response, response + len(tree.responses))
        names = zip(micro_batch.sources[of_pairs], micro_batch.origins[of_pairs], strict=True)
        groups.append(
            PromptGroup(
                [PairName(*name) for name in names],
                tree,
                [at - response for at in chosen[of_pairs]],
                [] if rejected is None else [at - response for at in rejected[of_pairs]],
                micro_batch.keys[of_tree],
                place,
            )
        )
        pair, response = of_pairs.stop, of_tree.stop
    return groups


def tree_of(pair: EncodedPair) -> PromptTree:
    """Return the tree of one pair."""
    responses = tuple(ids for ids in (pair.chosen_ids, pair.rejected_ids) if ids is not None)
    return PromptTree(pair.prompt_ids, responses, pair.vision, pair.token_types)


def lay_out(pairs: Sequence[EncodedPair], shared: bool = True, keyed: bool = False, group: int = 1) -> MicroBatch:
    """Put encoded pairs (possibly none) into one micro-batch, however many tokens they have; see :class:`Collator`."""
    return merge(Collator(None, shared, keyed, group)(pairs).micro_batches)


def merge(micro_batches: Sequence[MicroBatch]) -> MicroBatch:
    """Return all pairs of ``micro_batches`` (at least one) as one micro-batch."""
    if len(micro_batches) == 1:
        return micro_batches[0]
    offsets = [0, *itertools.accumulate(part.num_responses for part in micro_batches)]
    numbered = list(zip(micro_batches, offsets, strict=False))
    rejected = [part.rejected + offset for part, offset in numbered if part.rejected is not None]
    return MicroBatch(
        rows=[row for part in micro_batches for row in part.rows],
        chosen=torch.cat([part.chosen + offset for part, offset in numbered]),
        rejected=torch.cat(rejected) if rejected else None,
        chosen_lengths=torch.cat([part.chosen_lengths for part in micro_batches]),
        sources=[source for part in micro_batches for source in part.sources],
        origins=[origin for part in micro_batches for origin in part.origins],
        keys=[key for part in micro_batches for key in part.keys],
        groups=[group for part in micro_batches for group in part.groups],
    )


def response_keys(tree: PromptTree) -> list[bytes]:
    """Hash each response's content: the prompt's tokens and images as the model reads them, and its own tokens."""
    named = sorted({**tree.vision, **tree.token_types}.items())
    shapes = [f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() for name, tensor in named]
    prompt = content_key(_bytes_of(tree.prompt_ids), *shapes, *(_bytes_of(tensor) for _, tensor in named))
    return [content_key(prompt, _bytes_of(response)) for response in tree.responses]


def _same_prompt(one: EncodedPair, other: EncodedPair) -> bool:
    """Compare what the model reads: token ids, their types, pixels."""
    first, second = ({"": pair.prompt_ids, **pair.vision, **pair.token_types} for pair in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _indices(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
