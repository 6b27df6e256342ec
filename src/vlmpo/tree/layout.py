"""Lay prompts and responses out in one row.

A prompt (its images included) and the responses to it are a tree. A row holds the tokens of one or more trees behind
one another, without padding: ``prompt response response ... | prompt response ...``. Positions of every response
continue from the end of its prompt, so a response reads exactly as if it were the only one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmpo.tree.vision import item_dimension, merge_vision, split_vision


@dataclass(frozen=True)
class PromptTree:
    """Holds one prompt and the responses to be scored on it.

    Attributes:
        prompt_ids: ``[prompt]``, token ids of the prompt, image tokens expanded; at least one.
        responses: ids of each response's scored tokens, ``[length]`` each; at least one token each.
        vision: the processor's vision tensors for this prompt alone (InternVL: ``pixel_values [tiles, 3, h, w]``).
        token_types: the processor's marks of each prompt token, ``[prompt]`` each; a response's are 0.
    """

    prompt_ids: Tensor
    responses: tuple[Tensor, ...]
    vision: dict[str, Tensor] = field(default_factory=dict)
    token_types: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompt_ids.numel() == 0:
            raise ValueError(
                "a tree needs a prompt of at least one token: the first response token is predicted from it"
            )
        if not self.responses or any(response.numel() == 0 for response in self.responses):
            raise ValueError("a tree needs at least one response, and every response at least one token")

    @property
    def num_tokens(self) -> int:
        """Tokens that the tree takes in a row: the prompt once, and every response once."""
        return self.prompt_ids.numel() + sum(response.numel() for response in self.responses)

    def separate(self) -> list[PromptTree]:
        """Return one tree for each response, for a model that cannot share a prompt."""
        return [replace(self, responses=(response,)) for response in self.responses]


class TreeSpan(NamedTuple):
    """Locates a tree in its row: first token, prompt length, lengths of the responses that follow it."""

    start: int
    prompt: int
    responses: tuple[int, ...]


class Segments(NamedTuple):
    """Describes a row as one attention call over segments of queries, each with its own stretch of gathered keys.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: ``[segments + 1]`` int32, where each begins; the last entry is the end.
        max_seqlen_q, max_seqlen_k: tokens of the longest.
        keys: ``[gathered]``, the token of the row that each key is; None if the keys are the row itself.
        key_of_token: ``[tokens]``, the place in ``keys`` of each token in its own segment; None if ``keys`` is.
        repeats: the further copies of prompts: first token in the row, first place in ``keys``, length.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    keys: Tensor | None
    key_of_token: Tensor | None
    repeats: tuple[tuple[int, int, int], ...]


def _attention_segments(spans: Sequence[TreeSpan], device: torch.device) -> Segments:
    queries: list[int] = []
    keys: list[Tensor] = []
    key_of_token: list[Tensor] = []
    repeats: list[tuple[int, int, int]] = []
    place = 0
    for span in spans:
        at = span.start
        for number, length in enumerate(span.responses):
            if number:
                repeats.append((span.start, place, span.prompt))
                keys.append(torch.arange(span.start, span.start + span.prompt))
                place += span.prompt
            else:
                length += span.prompt
            queries.append(length)
            keys.append(torch.arange(at, at + length))
            key_of_token.append(torch.arange(place, place + length))
            at, place = at + length, place + length
    longest = max(span.prompt + max(span.responses) for span in spans)
    starts = torch.tensor([0, *queries]).cumsum(0)
    # A segment's keys end where its own tokens end.
    ends = torch.cat([part[-1:] + 1 for part in key_of_token])
    return Segments(
        cu_seqlens_q=starts.to(device, torch.int32),
        cu_seqlens_k=torch.cat([ends.new_zeros(1), ends]).to(device, torch.int32),
        max_seqlen_q=max(queries),
        max_seqlen_k=longest,
        keys=torch.cat(keys).to(device) if repeats else None,
        key_of_token=torch.cat(key_of_token).to(device) if repeats else None,
        repeats=tuple(repeats),
    )


class RowLayout:
    """Holds the spans of the trees in a row; the attention reads nothing else.

    Wrappers that walk through nested inputs leave an object of such a class alone. Masks that are made for one layer
    are kept for all others.

    Attributes:
        spans: the trees, in order.
        blocks: ``[tokens]``, for a family whose images attend to themselves in both directions: the block of image
            tokens that each token belongs to, -1 for text; None for other families. A response holds no image.
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
        return sum(span.prompt + sum(span.responses) for span in self.spans)

    def segments(self, device: torch.device) -> Segments:
        """Return the segments of one attention call over the row; they are made once for all layers."""
        if device not in self._segments:
            self._segments[device] = _attention_segments(self.spans, device)
        return self._segments[device]

    def prompt_mask(self, span: TreeSpan, window: int | None, device: torch.device) -> Tensor | None:
        """Return which tokens the prompt of ``span`` and its first response see, ``[tokens, tokens]`` bool.

        None if plain causal attention is enough: no block of image tokens, and no more tokens than ``window``.
        """
        tokens = span.prompt + span.responses[0]
        window = None if window is None or tokens <= window else window
        key = ("prompt", span.start, window, device)
        if key not in self._masks:
            self._masks[key] = self._prompt_mask(span.start, tokens, window, device)
        return self._masks[key]

    def _prompt_mask(self, start: int, tokens: int, window: int | None, device: torch.device) -> Tensor | None:
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

    def response_mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """Return ``[queries, keys]`` bool: the last query sees all keys, each one before it one key less.

        With ``window`` it sees the last ``window`` of those only, itself among them.
        """
        key = ("response", queries, keys, window, device)
        if key not in self._masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
            mask = ones.tril(diagonal=keys - queries)
            self._masks[key] = mask if window is None else mask & ones.triu(diagonal=1 + keys - queries - window)
        mask_or_none = self._masks[key]
        assert mask_or_none is not None
        return mask_or_none


_TEXT_TENSORS = ("input_ids", "position_ids", "logit_positions", "targets", "response_index")


@dataclass(frozen=True)
class PackedRow:
    """Holds one row, ready for the model.

    Attributes:
        input_ids, position_ids: ``[1, tokens]``.
        layout: the spans, for the attention.
        logit_positions: ``[scored]``, for each scored token the position in the row whose hidden state predicts it. The
            prompt's last position occurs once per response.
        targets: ``[scored]``, the scored tokens' ids.
        response_index: ``[scored]``, which response of the row each scored token belongs to, counted through the row.
        num_responses: responses in the row.
        vision: the trees' vision tensors, put together in order of the trees.
        token_types: ``[1, tokens]`` each, by the processor's name.
        dummy_tokens: tokens at the row's end that no scored token sees, see :func:`append_dummy`.
        vision_counts: how many entries of each vision tensor each tree has.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: RowLayout
    logit_positions: Tensor
    targets: Tensor
    response_index: Tensor
    num_responses: int
    vision: dict[str, Tensor]
    token_types: dict[str, Tensor] = field(default_factory=dict)
    dummy_tokens: int = 0
    vision_counts: tuple[dict[str, int], ...] = ()

    def to(self, device: torch.device) -> PackedRow:
        """Return the row with its tensors on ``device``."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in _TEXT_TENSORS}
        for name in ("vision", "token_types"):
            moved[name] = {key: tensor.to(device, non_blocking=True) for key, tensor in getattr(self, name).items()}
        return replace(self, **moved)


def build_row(trees: Sequence[PromptTree]) -> PackedRow:
    """Lay ``trees`` out behind one another in one row."""
    ids: list[Tensor] = []
    positions: list[NDArray[np.int64]] = []  # numpy: quicker than torch with a few numbers
    logit_positions: list[NDArray[np.int64]] = []
    response_index: list[NDArray[np.int64]] = []
    spans: list[TreeSpan] = []
    start = num_responses = 0
    for tree in trees:
        prompt = tree.prompt_ids.numel()
        lengths = tuple(response.numel() for response in tree.responses)
        ids += [tree.prompt_ids, *tree.responses]
        positions.append(np.arange(prompt))
        spans.append(TreeSpan(start, prompt, lengths))
        at = start + prompt
        for length in lengths:
            positions.append(np.arange(prompt, prompt + length))
            # The first token of EVERY response is predicted from the prompt's last position, the others from their own.
            logit_positions += [np.array([start + prompt - 1]), np.arange(at, at + length - 1)]
            response_index.append(np.full(length, num_responses))
            at += length
            num_responses += 1
        start = at
    return PackedRow(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        layout=RowLayout(tuple(spans)),
        logit_positions=torch.from_numpy(np.concatenate(logit_positions)),
        targets=torch.cat([response for tree in trees for response in tree.responses]),
        response_index=torch.from_numpy(np.concatenate(response_index)),
        num_responses=num_responses,
        vision=merge_vision([tree.vision for tree in trees]),
        token_types=_token_types(trees),
        vision_counts=tuple(
            {name: tensor.shape[item_dimension(name, tree.vision.keys())] for name, tensor in tree.vision.items()}
            for tree in trees
        ),
    )


def trees_of(row: PackedRow) -> list[PromptTree]:
    """Return the trees that ``row``, without dummies, was built of; needed only if it turns out too large to read."""
    trees = []
    vision = split_vision(row.vision, row.vision_counts)
    for span, of_tree in zip(row.layout.spans, vision, strict=True):
        prompt, *responses = row.input_ids[0, span.start :].split(
            [span.prompt, *span.responses, row.layout.num_tokens - span.start - span.prompt - sum(span.responses)]
        )[:-1]
        ends = slice(span.start, span.start + span.prompt)
        types = {name: marks[0, ends] for name, marks in row.token_types.items()}
        trees.append(PromptTree(prompt, tuple(responses), of_tree, types))
    return trees


def _token_types(trees: Sequence[PromptTree]) -> dict[str, Tensor]:
    """Return the types of all tokens of a row: 0 in every response, and in a prompt whose tree has none."""
    types: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for tree in trees for name in tree.token_types):
        parts = []
        for tree in trees:
            prompt = tree.token_types.get(name, torch.zeros_like(tree.prompt_ids))
            parts += [prompt, *(torch.zeros_like(response) for response in tree.responses)]
        types[name] = torch.cat(parts)[None]
    return types
