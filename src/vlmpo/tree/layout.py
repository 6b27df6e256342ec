"""Lay prompts and responses out in one row.

A prompt (its images included) and the responses to it are a tree. A row holds the tokens of one or more trees behind
one another, without padding: ``prompt response response ... | prompt response ...``. Positions of every response
continue from the end of its prompt, so a response reads exactly as if it were the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    All tensors are int32.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: ``[segments + 1]``, where each begins; the last entry is the end.
        max_seqlen_q, max_seqlen_k: tokens of the longest.
        keys: ``[gathered]``, the token of the row that each key is; None if the keys are the row itself.
        places: ``[gathered]``, the places in ``keys`` of the row's first token, of its second, and so on.
        first_place: ``[tokens]``, where in ``places`` those of each token begin.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    keys: Tensor | None
    places: Tensor | None
    first_place: Tensor | None

    def to(self, device: torch.device) -> Segments:
        """Return the segments on ``device``, moved by one copy."""
        whole = [tensor for tensor in self if isinstance(tensor, Tensor)]
        moved = torch.cat(whole).to(device, non_blocking=True).split([tensor.numel() for tensor in whole])
        names = [name for name, value in self._asdict().items() if isinstance(value, Tensor)]
        return self._replace(**dict(zip(names, moved, strict=True)))


def _attention_segments(spans: Sequence[TreeSpan]) -> Segments:
    queries: list[int] = []
    stretches: list[NDArray[np.int64]] = []  # numpy: quicker than torch with a few numbers
    seen: list[int] = []
    for span in spans:
        at = span.start
        prompt = np.arange(at, at + span.prompt)
        for number, length in enumerate(span.responses):
            own = length if number else span.prompt + length
            keys = [prompt, np.arange(at, at + own)] if number else [np.arange(at, at + own)]
            queries.append(own)
            stretches += keys
            seen.append(sum(map(len, keys)))
            at += own
    gathered = np.concatenate(stretches)
    repeated = len(gathered) > sum(queries)
    counts = np.bincount(gathered)  # of a token: 1, and of a prompt's as many as it has responses

    def starts(lengths: Any) -> Tensor:
        return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

    return Segments(
        cu_seqlens_q=starts(queries),
        cu_seqlens_k=starts(seen),
        max_seqlen_q=max(queries),
        max_seqlen_k=max(seen),
        keys=torch.from_numpy(gathered.astype(np.int32)) if repeated else None,
        places=torch.from_numpy(np.argsort(gathered, kind="stable").astype(np.int32)) if repeated else None,
        first_place=starts(counts)[:-1] if repeated else None,
    )


class RowLayout:
    """Holds the spans of the trees in a row; the attention reads nothing else.

    Wrappers that walk through nested inputs leave an object of such a class alone. Masks that are made for one layer
    are kept for all others.

    Attributes:
        spans: the trees, in order.
        num_tokens: tokens in the row.
        longest: of prompts with one of their responses, the most tokens.
        numbers: on the CPU: of each tree the tokens of its prompt, how many responses it has, and the tokens of each.
        kernel: attends over the whole row in one call; None: SDPA does, segment by segment. Chosen when a row is read.
        parts: the segments that the kernel attends over, on the model's device; None without a kernel.
        blocks: ``[tokens]``, for a family whose images attend to themselves in both directions: the block of image
            tokens that each token belongs to, -1 for text; None for other families. A response holds no image.
        positions: ``[3, 1, tokens]``, for a family that counts in three dimensions, once its model has counted.
        features: the images' features, while one model hands them to the other (:mod:`vlmpo.tree.features`).
    """

    def __init__(self, spans: tuple[TreeSpan, ...]) -> None:
        self.spans = spans
        self.num_tokens = sum(span.prompt + sum(span.responses) for span in spans)
        self.longest = max((span.prompt + max(span.responses) for span in spans), default=0)
        self.numbers = torch.tensor([n for s in spans for n in (s.prompt, len(s.responses), *s.responses)])
        self.kernel: Any = None
        self.parts: Segments | None = None
        self.blocks: Tensor | None = None
        self.positions: Tensor | None = None
        self.features: Any = None
        self._masks: dict[tuple[Any, ...], Tensor | None] = {}
        self._hidden: dict[int, Tensor] = {}
        self._segments: dict[torch.device, Segments] = {}

    @classmethod
    def from_numbers(cls, numbers: Tensor, blocks: Tensor | None) -> RowLayout:
        """Build a layout again from its ``numbers`` and ``blocks``."""
        spans, start = [], 0
        values = iter(numbers.tolist())
        for prompt in values:
            responses = tuple(next(values) for _ in range(next(values)))
            spans.append(TreeSpan(start, prompt, responses))
            start += prompt + sum(responses)
        layout = cls(tuple(spans))
        layout.blocks = blocks
        return layout

    def to(self, device: torch.device) -> RowLayout:
        """Return the layout with all that the layers need on ``device``, so that none of them has to wait for it."""
        moved = RowLayout(self.spans)
        if self.blocks is not None:
            moved.blocks = self.blocks.to(device, non_blocking=True)
        if self.positions is not None:
            moved.positions = self.positions.to(device, non_blocking=True)
        if device.type == "cuda":  # elsewhere rows are read segment by segment
            moved.segments(device)
        return moved

    def segments(self, device: torch.device) -> Segments:
        """Return the segments of one attention call over the row; they are made once for all layers."""
        if device not in self._segments:
            self._segments[device] = _attention_segments(self.spans).to(device)
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

    def hidden(self, mask: Tensor) -> Tensor:
        """Return a mask of this layout as what is added to scores, float32: -inf where it is False, else 0."""
        if id(mask) not in self._hidden:  # the mask lives as long as the layout
            hidden = torch.zeros(mask.shape, device=mask.device)
            self._hidden[id(mask)] = hidden.masked_fill_(~mask, float("-inf"))
        return self._hidden[id(mask)]


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
        host_ids: ``input_ids`` before the row was moved to its device; None: it was not.
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
    host_ids: Tensor | None = None
    vision_counts: tuple[dict[str, int], ...] = ()

    @property
    def response_lengths(self) -> list[int]:
        """Scored tokens of each response; dummies, which come last, are not scored."""
        return [length for span in self.layout.spans for length in span.responses][: self.num_responses]

    def to(self, device: torch.device) -> PackedRow:
        """Return the row with its tensors on ``device``."""
        host_ids = self.input_ids if self.host_ids is None else self.host_ids
        moved = self._with_each(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, layout=self.layout.to(device), host_ids=host_ids)

    def pin_memory(self) -> PackedRow:
        """Return the row with its tensors in memory from which a CUDA device copies while it computes."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> PackedRow:
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in _TEXT_TENSORS}
        for name in ("vision", "token_types"):
            changed[name] = {key: change(tensor) for key, tensor in getattr(self, name).items()}
        return replace(self, **changed)


def rows_of(trees: Sequence[PromptTree], shared: bool) -> list[PackedRow]:
    """Lay ``trees`` out in one row; unless they are ``shared``, each response with its prompt in a row of its own."""
    if shared:
        return [build_row(trees)] if trees else []
    return [build_row([alone]) for tree in trees for alone in tree.separate()]


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
    """Return the trees that ``row`` was built of, without a dummy; needed only if it turns out too large to read."""
    trees = []
    count = len(row.vision_counts)
    # A dummy is behind all trees, and in a row that has no image but the dummy's.
    vision = [{}] * count if row.dummy_tokens else split_vision(row.vision, row.vision_counts)
    for span, of_tree in zip(row.layout.spans[:count], vision, strict=True):
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
