"""Count the positions of a row's tokens as its family does, and find blocks of tokens that attend in both directions.

Positions of the prompt and its first response are always counted by the model. Every other response restarts at the
first response's first position, as if it were the only response.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmpo.errors import ModelError
from vlmpo.models.families import family_of
from vlmpo.tree.layout import PackedRow, RowLayout

TYPES = "mm_token_type_ids"
_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def refuse_missing_types(model: Any, row: PackedRow) -> None:
    """Raise ModelError if the image tokens are not marked: some models would count in one dimension without notice."""
    if not family_of(model.config).three_dimensional or TYPES in row.token_types:
        return
    if any(name in row.vision for name in _GRIDS):
        raise ModelError(
            f"family {model.config.model_type!r} needs {TYPES} beside its images, and its processor gave none; use the "
            "processor that belongs to the model"
        )


def ready_on_host(model: Any, row: PackedRow) -> None:
    """Keep in the row's layout whatever depends on the row alone: positions, blocks of image tokens.

    Called before the row is moved to its device: on the CPU the many small decisions behind positions wait for nothing.

    Args:
        model: under no wrapper.
        row: that shares its prompts.
    """
    refuse_missing_types(model, row)
    positions_of(model, row)
    layout_of(model, row)


def positions_of(model: Any, row: PackedRow) -> Tensor:
    """Return the position ids of ``row``: ``[1, tokens]``, or ``[3, 1, tokens]`` in three dimensions."""
    if not family_of(model.config).three_dimensional:
        return row.position_ids
    if row.layout.positions is None:  # once a row: policy, reference and a recomputed forward read the same
        row.layout.positions = _three_dimensional(model.base_model, row)
    return row.layout.positions.to(row.input_ids.device)


def _three_dimensional(base: Any, row: PackedRow) -> Tensor:
    """Return ``[3, 1, tokens]``. The trees go in as a padded batch: the model itself gives each its own images."""
    firsts = [slice(span.start, span.start + span.prompt + span.responses[0]) for span in row.layout.spans]
    types = row.token_types.get(TYPES, torch.zeros_like(row.input_ids))  # none: no image in any tree
    counted, _ = base.get_rope_index(
        pad_sequence([row.input_ids[0, first] for first in firsts], batch_first=True),
        mm_token_type_ids=pad_sequence([types[0, first] for first in firsts], batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(row.input_ids[0, first]) for first in firsts], batch_first=True),
        **{name: row.vision[name] for name in _GRIDS if name in row.vision},
    )  # [3, trees, tokens of the longest]
    parts: list[Tensor] = []
    for tree, span in enumerate(row.layout.spans):
        parts.append(counted[:, tree, : span.prompt + span.responses[0]])
        start = counted[:, tree, span.prompt, None]  # [3, 1]
        parts += [start + torch.arange(length, device=start.device) for length in span.responses[1:]]
    return torch.cat(parts, dim=1)[:, None]


def layout_of(model: Any, row: PackedRow) -> RowLayout:
    """Return the row's layout, with its blocks of image tokens if ``model`` reads those in both directions."""
    types = row.token_types.get("token_type_ids")
    if family_of(model.config).image_blocks and types is not None and row.vision and row.layout.blocks is None:
        image = types[0] == 1
        starts = image & ~torch.cat([image.new_zeros(1), image[:-1]])
        row.layout.blocks = torch.where(image, starts.cumsum(0) - 1, -1)
    return row.layout
