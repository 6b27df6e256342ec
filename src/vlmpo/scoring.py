"""Computes the log-probabilities of the responses of preference pairs, outside of any training run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.formats import as_pairs
from vlmpo.models.adapters import unwrap_peft
from vlmpo.models.families import support_for
from vlmpo.models.fit import check_features, check_processor, limits_of
from vlmpo.models.mode import in_mode
from vlmpo.train.batching import tree_of
from vlmpo.train.memory_choice import row_tokens
from vlmpo.tree import forward
from vlmpo.tree.layout import PackedRow, PromptTree, build_row, rows_of


def response_logps(
    model: Any, processor: Any, pairs: Any, *, max_tiles: int | None = None
) -> list[tuple[float, float]]:
    """Return the log-probabilities of each pair's chosen and rejected response, in nats, in order of ``pairs``.

    Each is the sum over the response's tokens, the end of the turn included, without gradient and without dropout. The
    prompt is read once for both responses if the model's family allows it. The model is left as it was. It is read in
    the type of its weights; if it belongs to an MPOTrainer, in the precision that this trains it in.

    Args:
        model: a transformers model, text-only or not, or a PEFT model, which is read under its active adapter; it may
            belong to an MPOTrainer.
        processor: the model's own processor, or its tokenizer if it is text-only.
        pairs: PreferencePairs, or records of any format vlmpo reads: a ``datasets.Dataset``, a list of dicts, anything
            with ``len()`` and items by number.
        max_tiles: tiles the images of a pair may take together; None: what the processor allows one image.

    Raises:
        DataError: records of no known format, or a streaming data set, which has no length.
        RecordError: a pair that cannot be scored, for example one without a rejected response.
        ModelError: the processor has no usable chat template, or is another model's.
    """
    encoder = PairEncoder(processor, max_tiles=max_tiles, **limits_of(model))
    check_features(model, processor, check_processor(model, encoder))
    base = unwrap_peft(model)
    device = next(model.parameters()).device
    logps: list[float] = []
    with (
        torch.no_grad(),
        in_mode(model, training=False),
        forward.installed(base, support_for(base.config).shared) as shared,
    ):
        for row in _rows(encoder, as_pairs(pairs, name="pairs"), shared, row_tokens(device.type)):
            logps += forward.response_logps(model, [row.to(device)]).tolist()
    return list(zip(logps[::2], logps[1::2], strict=True))


def _rows(encoder: PairEncoder, pairs: Any, shared: bool, max_tokens: int) -> Iterator[PackedRow]:
    """Encode pairs one by one and fill rows in their order, so that only one row's images are in memory."""
    trees: list[PromptTree] = []
    for index in range(len(pairs)):
        pair = pairs[index]
        encoded = encoder.encode(pair if pair.origin else replace(pair, origin=f"pairs[{index}]"))
        assert encoded.rejected_ids is not None  # the encoder refuses a pair without
        tree = tree_of(encoded)
        if not shared:
            yield from rows_of([tree], shared)
            continue
        if trees and sum(other.num_tokens for other in trees) + tree.num_tokens > max_tokens:
            yield build_row(trees)
            trees = []
        trees.append(tree)
    if trees:
        yield build_row(trees)
