"""Find a row's image tokens on the CPU: a model's own check of their number would wait for the device in each pass.

transformers counts image tokens in the token ids on the device and compares the count with the features. That waits
until the vision tower is done, and only then can the first text layer be launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlmpo.tree.layout import PackedRow

_FINDER = "get_placeholder_mask"  # a public method of the base models that take images, alike in all of them


@contextmanager
def placeholders_from_host(base: Any, row: PackedRow) -> Iterator[None]:
    """Let ``base`` find the image tokens of ``row`` in the ids that the row had on the CPU, while the body reads it.

    Nothing changes for a row that was never moved, or a model without such a method.
    """
    find = getattr(base, _FINDER, None)
    if find is None or row.host_ids is None:
        yield
        return

    def found(input_ids: Tensor, inputs_embeds: Tensor, **features: Any) -> Any:
        # Of embeddings and features only the shapes are read.
        shape = torch.empty((), dtype=inputs_embeds.dtype).expand(inputs_embeds.shape)
        masks = find(row.host_ids, inputs_embeds=shape, **features)
        if isinstance(masks, tuple):
            return tuple(mask.to(inputs_embeds.device, non_blocking=True) for mask in masks)
        return masks.to(inputs_embeds.device, non_blocking=True)

    setattr(base, _FINDER, found)
    try:
        yield
    finally:
        delattr(base, _FINDER)
