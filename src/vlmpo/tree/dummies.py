"""Tokens that are read and not scored: how a row without an image still runs through the image tower.

Ranks that shard a model's weights must call the same layers in the same order. A row that holds no image would leave
out the tower. So a prompt with an image is laid out behind it: what stands before it in the row cannot see it
(attention is causal, trees do not see each other), no score is taken from it, and its gradient is exactly zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from vlmpo.tree.layout import PackedRow, PromptTree, build_row


def append_dummy(row: PackedRow, tree: PromptTree) -> PackedRow:
    """``row``, which holds no vision tensors, with ``tree`` behind it; scored are the same tokens as before."""
    whole = build_row([*trees_of(row), tree])
    scored = row.targets.numel()
    return replace(
        whole,
        logit_positions=whole.logit_positions[:scored],
        targets=whole.targets[:scored],
        response_index=whole.response_index[:scored],
        num_responses=row.num_responses,
        dummy_tokens=tree.num_tokens,
    )


def dummy_row(trees: Sequence[PromptTree]) -> PackedRow:
    """A row that belongs to no pair: all of its tokens count as unscored."""
    row = build_row(trees)
    return replace(row, dummy_tokens=row.layout.num_tokens)


def trees_of(row: PackedRow) -> list[PromptTree]:
    """The trees that a row without vision tensors was built from."""
    trees = []
    for span in row.layout.spans:
        ends = [span.start + span.prompt]
        for length in span.responses:
            ends.append(ends[-1] + length)
        prompt = slice(span.start, ends[0])
        responses = tuple(row.input_ids[0, a:b] for a, b in itertools.pairwise(ends))
        types = {name: values[0, prompt] for name, values in row.token_types.items()}
        trees.append(PromptTree(row.input_ids[0, prompt], responses, {}, types))
    return trees
