"""Trunks and branches laid out in one row.

A prompt (its images included) is a TRUNK, each response to it a BRANCH. A row holds the tokens of one or more trees
behind one another, without padding: ``trunk branch branch ... | trunk branch ...``. Positions of every branch continue
from the end of its trunk, so a branch reads exactly as if it were the only response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmpo.tree.vision import merge_vision


@dataclass(frozen=True)
class PromptTree:
    """One prompt and the responses to be scored on it.

    Attributes:
        trunk_ids: ``[trunk]``, token ids of the prompt, image tokens expanded; at least one.
        branches: ids of each response's scored tokens, ``[length]`` each; at least one token each.
        vision: the processor's vision tensors for this prompt alone (InternVL: ``pixel_values [tiles, 3, h, w]``).
        token_types: what the processor says of each trunk token beside its id, ``[trunk]`` each; a branch's are 0.
    """

    trunk_ids: Tensor
    branches: tuple[Tensor, ...]
    vision: dict[str, Tensor] = field(default_factory=dict)
    token_types: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.trunk_ids.numel() == 0:
            raise ValueError("a tree needs a trunk of at least one token: the first branch token is predicted from it")
        if not self.branches or any(branch.numel() == 0 for branch in self.branches):
            raise ValueError("a tree needs at least one branch, and every branch at least one token")

    @property
    def num_tokens(self) -> int:
        """Tokens the tree takes in a row: the trunk once, every branch once."""
        return self.trunk_ids.numel() + sum(branch.numel() for branch in self.branches)

    def separate(self) -> list[PromptTree]:
        """The same responses as one tree each: what a model reads that cannot share a trunk."""
        return [replace(self, branches=(branch,)) for branch in self.branches]


class TreeSpan(NamedTuple):
    """Where a tree lies in its row: first token, trunk length, lengths of the branches that follow it."""

    start: int
    trunk: int
    branches: tuple[int, ...]


class Segments(NamedTuple):
    """A row as one attention call over segments of queries, each with its own stretch of gathered keys.

    Attributes:
        query_starts, key_starts: ``[segments + 1]`` int32, where each begins; the last entry is the end.
        longest_query, longest_key: tokens of the longest.
        keys: ``[gathered]``, the token of the row that each key is; None where the keys are the row itself.
        own: ``[tokens]``, where in ``keys`` each token stands in its own segment; None with ``keys``.
        repeats: trunks once more: first token in the row, first place in ``keys``, length.
    """

    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    keys: Tensor | None
    own: Tensor | None
    repeats: tuple[tuple[int, int, int], ...]


def _segments(spans: Sequence[TreeSpan], device: torch.device) -> Segments:
    queries: list[int] = []
    keys: list[Tensor] = []
    own: list[Tensor] = []
    repeats: list[tuple[int, int, int]] = []
    place = 0
    for span in spans:
        at = span.start
        for number, length in enumerate(span.branches):
            if number:
                repeats.append((span.start, place, span.trunk))
                keys.append(torch.arange(span.start, span.start + span.trunk))
                place += span.trunk
            else:
                length += span.trunk
            queries.append(length)
            keys.append(torch.arange(at, at + length))
            own.append(torch.arange(place, place + length))
            at, place = at + length, place + length
    longest = max(span.trunk + max(span.branches) for span in spans)
    starts = torch.tensor([0, *queries]).cumsum(0)
    # A segment's keys end where its own tokens end.
    ends = torch.cat([part[-1:] + 1 for part in own])
    return Segments(
        query_starts=starts.to(device, torch.int32),
        key_starts=torch.cat([ends.new_zeros(1), ends]).to(device, torch.int32),
        longest_query=max(queries),
        longest_key=longest,
        keys=torch.cat(keys).to(device) if repeats else None,
        own=torch.cat(own).to(device) if repeats else None,
        repeats=tuple(repeats),
    )


class RowLayout:
    """The spans of the trees in a row; the attention reads nothing else.

    A class of its own, so that wrappers which walk through nested inputs leave it alone, and so that masks made for
    one layer serve all.

    Attributes:
        spans: the trees, in order.
        blocks: ``[tokens]``, for a family whose images attend to themselves in both directions: which block of image
            tokens each token belongs to, -1 for text; None everywhere else. A response holds no image.
        positions: ``[3, 1, tokens]``, for a family that counts in three dimensions, once its model has counted.
        features: the images' features, while one model hands them to the other (:mod:`vlmpo.tree.features`).
    """

    def __init__(self, spans: tuple[TreeSpan, ...]) -> None:
        self.spans = spans
        self.blocks: Tensor | None = None
        self.positions: Tensor | None = None
        self.features: Any = None
        self._masks: dict[tuple[Any, ...], Tensor | None] = {}
        self._segments: dict[torch.device, Segments] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens in the row."""
        return sum(span.trunk + sum(span.branches) for span in self.spans)

    def segments(self, device: torch.device) -> Segments:
        """The row as one attention call; made once, for all layers."""
        if device not in self._segments:
            self._segments[device] = _segments(self.spans, device)
        return self._segments[device]

    def trunk_mask(self, span: TreeSpan, window: int | None, device: torch.device) -> Tensor | None:
        """Who sees whom among the trunk of ``span`` and its first branch, ``[tokens, tokens]`` bool.

        None where plain causal attention says it all: no block of image tokens, and no more tokens than ``window``.
        """
        tokens = span.trunk + span.branches[0]
        window = None if window is None or tokens <= window else window
        key = ("trunk", span.start, window, device)
        if key not in self._masks:
            self._masks[key] = self._trunk_mask(span.start, tokens, window, device)
        return self._masks[key]

    def _trunk_mask(self, start: int, tokens: int, window: int | None, device: torch.device) -> Tensor | None:
        blocks = None if self.blocks is None else self.blocks[start : start + tokens].to(device)
        if blocks is not None and not bool((blocks >= 0).any()):
            blocks = None
        if blocks is None and window is None:
            return None
        ones = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
        seen = ones.tril()
        if blocks is not None:
            seen = seen | ((blocks[:, None] == blocks) & (blocks >= 0))
        return seen if window is None else seen & ones.triu(diagonal=1 - window)

    def branch_mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """``[queries, keys]`` bool: the last query sees all keys, each one before it one key less.

        With ``window`` it sees the last ``window`` of those only, itself among them.
        """
        key = ("branch", queries, keys, window, device)
        if key not in self._masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
            mask = ones.tril(diagonal=keys - queries)
            self._masks[key] = mask if window is None else mask & ones.triu(diagonal=1 + keys - queries - window)
        found = self._masks[key]
        assert found is not None
        return found


@dataclass(frozen=True)
class Row:
    """One row, ready for the model.

    Attributes:
        input_ids, position_ids: ``[1, tokens]``.
        layout: the spans, for the attention.
        predictors: ``[scored]``, for each scored token the position in the row whose hidden state predicts it. The
            trunk's last position stands there once per branch.
        targets: ``[scored]``, the scored tokens' ids.
        branch_of: ``[scored]``, which branch of the row each scored token belongs to, counted through the row.
        num_branches: branches in the row.
        vision: the trees' vision tensors, put together in order of the trees.
        token_types: ``[1, tokens]`` each, by the processor's name.
        unscored: tokens at the row's end that no scored token sees, see :func:`append_unscored`.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: RowLayout
    predictors: Tensor
    targets: Tensor
    branch_of: Tensor
    num_branches: int
    vision: dict[str, Tensor]
    token_types: dict[str, Tensor] = field(default_factory=dict)
    unscored: int = 0

    def to(self, device: torch.device) -> Row:
        """The row with its tensors on ``device``."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "predictors", "targets", "branch_of")
        }
        vision, token_types = (
            {name: tensor.to(device, non_blocking=True) for name, tensor in named.items()}
            for named in (self.vision, self.token_types)
        )
        return replace(self, vision=vision, token_types=token_types, **moved)


def build_row(trees: Sequence[PromptTree]) -> Row:
    """Lay ``trees`` out behind one another in one row."""
    ids: list[Tensor] = []
    positions: list[NDArray[np.int64]] = []  # numpy: quicker than torch with a few numbers
    predictors: list[NDArray[np.int64]] = []
    branch_of: list[NDArray[np.int64]] = []
    spans: list[TreeSpan] = []
    start = num_branches = 0
    for tree in trees:
        trunk = tree.trunk_ids.numel()
        lengths = tuple(branch.numel() for branch in tree.branches)
        ids += [tree.trunk_ids, *tree.branches]
        positions.append(np.arange(trunk))
        spans.append(TreeSpan(start, trunk, lengths))
        at = start + trunk
        for length in lengths:
            positions.append(np.arange(trunk, trunk + length))
            # The first token of EVERY branch is predicted from the trunk's last position, the others from their own.
            predictors += [np.array([start + trunk - 1]), np.arange(at, at + length - 1)]
            branch_of.append(np.full(length, num_branches))
            at += length
            num_branches += 1
        start = at
    return Row(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        layout=RowLayout(tuple(spans)),
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.cat([branch for tree in trees for branch in tree.branches]),
        branch_of=torch.from_numpy(np.concatenate(branch_of)),
        num_branches=num_branches,
        vision=merge_vision([tree.vision for tree in trees]),
        token_types=_token_types(trees),
    )


def _token_types(trees: Sequence[PromptTree]) -> dict[str, Tensor]:
    """Types of all tokens of a row: a trunk's as its tree has them, 0 where it has none and in every branch."""
    types: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for tree in trees for name in tree.token_types):
        parts = []
        for tree in trees:
            trunk = tree.token_types.get(name, torch.zeros_like(tree.trunk_ids))
            parts += [trunk, *(torch.zeros_like(branch) for branch in tree.branches)]
        types[name] = torch.cat(parts)[None]
    return types


def pack(trees: Sequence[PromptTree], max_tokens: int | None) -> list[list[int]]:
    """Which trees go into which row: indices, in order within a row; the longest row first. ``None``: all in one row.

    A row holds at most ``max_tokens``, unless one tree alone is longer. There are as few rows as a short search finds,
    and among those it evens out their tokens. Equal trees give equal rows.
    """
    sizes = [tree.num_tokens for tree in trees]
    if max_tokens is None:
        return [list(range(len(sizes)))] if sizes else []
    alone = [[index] for index, size in enumerate(sizes) if size > max_tokens]
    others = [index for index, size in enumerate(sizes) if size <= max_tokens]
    longest_first = sorted(others, key=lambda index: -sizes[index])
    rows = min((_first_fit(order, sizes, max_tokens) for order in (longest_first, others)), key=len)
    fewest = -(-sum(sizes[index] for index in others) // max_tokens)
    for count in range(max(fewest, 1), len(rows) + 1):
        even = _evenly(longest_first, sizes, count)
        if all(sum(sizes[index] for index in row) <= max_tokens for row in even):
            rows = even
            break
    found = [sorted(row) for row in (*alone, *rows) if row]
    return sorted(found, key=lambda row: (-sum(sizes[index] for index in row), row))


def _first_fit(order: Sequence[int], sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Each tree into the first row that has room for it. Never more rows than if each row were closed for the next."""
    rows: list[list[int]] = []
    rooms: list[int] = []
    for index in order:
        at = next((at for at, room in enumerate(rooms) if room >= sizes[index]), len(rows))
        if at == len(rows):
            rows.append([])
            rooms.append(max_tokens)
        rows[at].append(index)
        rooms[at] -= sizes[index]
    return rows


def _evenly(longest_first: Sequence[int], sizes: Sequence[int], count: int) -> list[list[int]]:
    """Each tree into the shortest of ``count`` rows so far."""
    rows: list[list[int]] = [[] for _ in range(count)]
    lengths = [0] * count
    for index in longest_first:
        at = lengths.index(min(lengths))
        rows[at].append(index)
        lengths[at] += sizes[index]
    return rows


def sum_by_branch(token_logps: Tensor, rows: Sequence[Row]) -> Tensor:
    """Log-probability of each branch: ``[scored]`` of all rows to ``[branches]``, the SUM over its scored tokens."""
    index: list[Tensor] = []
    seen = 0
    for row in rows:
        index.append(row.branch_of + seen)
        seen += row.num_branches
    sums = token_logps.new_zeros(seen)
    # Without rows the empty input itself is given back: it still hangs on the model's weights.
    return sums.index_add(0, torch.cat(index), token_logps) if index else token_logps
