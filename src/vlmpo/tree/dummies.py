"""Add tokens that are read and not scored, so that a row without an image still runs through the vision tower.

Ranks that shard a model's weights must call the same layers in the same order. A row without an image would skip the
tower. So a prompt with an image is put at its end: no other token of the row can see it (attention is causal, and trees
do not see each other), it is not scored, and its gradient is exactly zero.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vlmpo.tree.layout import PackedRow, PromptTree, RowLayout, build_row


def append_dummy(row: PackedRow, tree: PromptTree) -> PackedRow:
    """Put ``tree`` behind the trees of ``row``, which holds no vision tensors; the scored tokens stay the same."""
    dummy = build_row([tree])
    shift = row.layout.num_tokens
    shifted = (span._replace(start=span.start + shift) for span in dummy.layout.spans)
    token_types = {
        name: torch.cat([part.token_types.get(name, torch.zeros_like(part.input_ids)) for part in (row, dummy)], dim=1)
        for name in {**row.token_types, **dummy.token_types}
    }
    return replace(
        row,
        input_ids=torch.cat([row.input_ids, dummy.input_ids], dim=1),
        position_ids=torch.cat([row.position_ids, dummy.position_ids], dim=1),
        layout=RowLayout((*row.layout.spans, *shifted)),
        vision=dummy.vision,
        token_types=token_types,
        dummy_tokens=tree.num_tokens,
    )


def dummy_row(tree: PromptTree) -> PackedRow:
    """Build a row that belongs to no pair: all of its tokens are dummies."""
    row = build_row([tree])
    return replace(row, dummy_tokens=row.layout.num_tokens)
