"""Check before the first step that weights are finite and, on one real pair, that log-probs are the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vlmpo import compat
from vlmpo.data.encode.encoder import EncodedPair, EncodedPairs, Unusable
from vlmpo.errors import RecordError
from vlmpo.log import logger
from vlmpo.models.adapters import unwrap_peft
from vlmpo.models.finite import refuse_non_finite
from vlmpo.train.batching import MicroBatch, lay_out
from vlmpo.train.counts import PairCounts, nothing_left
from vlmpo.train.sharding import unwrapped
from vlmpo.tree.self_check import check_rows

_LOOKED_AT = 8  # usable pairs, among which one with an image is sought


def shared_rows_hold(
    pairs: EncodedPairs,
    model: Any,
    *,
    shared: bool,
    prepare: Callable[[MicroBatch], MicroBatch],
    half: bool,
    wrapped: Any | None,
    reference: Any | None,
    fail_on_bad: bool,
    gather: Callable[[Any], list[Any]],
) -> bool:
    """Read one pair as the run would and by the model's plain forward; log it and return False if shared rows differ.

    Args:
        pairs: the training pairs.
        model: the policy, set up by ``install``, under no wrapper.
        shared: whether the run shares prompts.
        prepare: moves a micro-batch to the device.
        half: whether the run computes in a half-precision type by autocast.
        wrapped: called in the model's place, if a wrapper holds its weights.
        reference: the second model in memory, if there is one.
        fail_on_bad: whether a bad record ends the run.
        gather: returns the object that each rank gives.

    Raises:
        ModelError: a weight is not finite, or even separate rows differ from the model's plain forward.
        DataError: no pair can be used.
        RecordError: likewise, under ``fail_on_bad``.
    """
    refuse_non_finite(model, f"model {_name(model)}", gather)
    if isinstance(reference, nn.Module):
        refuse_non_finite(reference, f"reference model {_name(reference)}", gather)
    pair = _pair_to_read(pairs, fail_on_bad)
    shared_rows, separate_rows = (prepare(lay_out([pair], way)).rows for way in (True, False))
    difference = check_rows(model, shared_rows if shared else None, separate_rows, half, wrapped)
    if difference is None:
        return True
    logger.info(
        f"NOT sharing the prompt between responses: on {pair.origin or 'the first pair'} shared and separate rows "
        f"differ by {difference:.3g} nats a token. Each response is read in a row of its own."
    )
    return False


def _pair_to_read(pairs: EncodedPairs, fail_on_bad: bool) -> EncodedPair:
    """Return one of the first usable pairs, with an image if any has one; raise DataError if there is none at all."""
    counts = PairCounts()
    found: list[EncodedPair] = []
    first: RecordError | None = None
    for item in map(pairs.__getitem__, range(len(pairs))):
        if isinstance(item, Unusable):
            first = first or item.error
            counts.drop(item.source, item.error)
            continue
        found.append(item)
        if len(found) == _LOOKED_AT:
            break
    if found:
        return max(found, key=lambda item: bool(item.vision))
    if fail_on_bad and first is not None:
        raise first
    fault = f"data.train: nothing to train on: none of the {len(pairs)} pairs can be used"
    raise nothing_left(fault, counts, "correct the records, or the settings that drop them")


def _name(model: Any) -> str:
    base = unwrap_peft(unwrapped(model))
    return compat.name_or_path(base.config) or type(base).__name__
