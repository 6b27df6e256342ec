"""What one rank reads in a training step: encoded pairs, laid out in rows, in micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.encode.pixels import PixelScale
from vlmpo.data.records import PreferencePair
from vlmpo.errors import RecordError
from vlmpo.train.logps_store import content_key
from vlmpo.train.sampler import split_runs
from vlmpo.tree.layout import PackedRow, PromptTree, build_row, pack


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
        return replace(self, rows=[replace(row, vision=scale.restored(row.vision)) for row in self.rows])


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
    return split_runs(pairs, most, _same_prompt)


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
