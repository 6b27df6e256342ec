"""Collate encoded pairs into the rows that one rank reads in a training step, each prompt once for its responses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlmpo.data.encode.encoder import EncodedPair, Unusable
from vlmpo.hashing import content_key
from vlmpo.train.sampler import split_runs
from vlmpo.tree.layout import PackedRow, PromptTree, build_row
from vlmpo.tree.packing import pack


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

    ``notices`` are those of its pairs: a loader's worker can tell the user nothing itself.
    """

    micro_batches: list[MicroBatch]
    dropped: list[Unusable] = field(default_factory=list)
    notices: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(micro_batch) for micro_batch in self.micro_batches)

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory; torch's loader calls this if it is to pin."""
        return replace(self, micro_batches=[micro_batch.pin_memory() for micro_batch in self.micro_batches])

    @property
    def num_chosen_tokens(self) -> int:
        """Scored tokens of all chosen responses."""
        return sum(int(micro_batch.chosen_lengths.sum()) for micro_batch in self.micro_batches)


class PromptGroup(NamedTuple):
    """Holds pairs of one prompt, their tree, and the index in it of each pair's chosen and rejected response."""

    pairs: list[EncodedPair]
    tree: PromptTree
    chosen: list[int]
    rejected: list[int]


@dataclass
class Collator:
    """Turns encoded pairs into a Batch.

    Attributes:
        max_tokens_per_row: most tokens of a row; None: one row a batch.
        shared: whether a prompt is read once for its responses. If not, each response gets a row of its own, and the
            pairs of one prompt are a micro-batch.
        keyed: whether micro-batches get the keys of their responses.
        group: most pairs that share one prompt.
    """

    max_tokens_per_row: int | None
    shared: bool
    keyed: bool = False
    group: int = 1

    def __call__(self, items: Sequence[EncodedPair | Unusable]) -> Batch:
        pairs = [item for item in items if isinstance(item, EncodedPair)]
        groups = []
        for indices in split_runs(
            range(len(pairs)), max(1, self.group), lambda one, other: _same_prompt(pairs[one], pairs[other])
        ):
            members = [pairs[index] for index in indices]
            # A response that several pairs have is read once.
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
            groups.append(PromptGroup(members, tree, chosen, rejected))
        if self.shared:
            packed = pack([group.tree for group in groups], self.max_tokens_per_row)
        else:
            packed = [[index] for index in range(len(groups))]
        # Without pairs there is still one micro-batch, of no rows: a step is a forward and a backward pass.
        micro_batches = []
        for indices in packed or [[]]:
            members_of_row = [groups[index] for index in indices]
            trees = [group.tree for group in members_of_row]
            if self.shared:
                rows = [build_row(trees)] if trees else []
            else:
                rows = [build_row([alone]) for tree in trees for alone in tree.separate()]
            offsets = [0, *itertools.accumulate(len(tree.responses) for tree in trees)]
            numbered = list(zip(members_of_row, offsets, strict=False))
            row_pairs = [pair for group in members_of_row for pair in group.pairs]
            with_rejected = not row_pairs or row_pairs[0].rejected_ids is not None
            micro_batches.append(
                MicroBatch(
                    rows=rows,
                    chosen=_indices([offset + at for group, offset in numbered for at in group.chosen]),
                    rejected=_indices([offset + at for group, offset in numbered for at in group.rejected])
                    if with_rejected
                    else None,
                    chosen_lengths=_indices([pair.chosen_ids.numel() for pair in row_pairs]),
                    sources=[pair.source for pair in row_pairs],
                    origins=[pair.origin for pair in row_pairs],
                    keys=[key for tree in trees for key in response_keys(tree)] if self.keyed else [],
                )
            )
        notices = {kind: remark for pair in pairs for kind, remark in pair.notices.items()}
        return Batch(micro_batches, [item for item in items if isinstance(item, Unusable)], notices)


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
