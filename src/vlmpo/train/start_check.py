"""The check before the first step: on one real pair, are the log-probs that training would read those of the model?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from vlmpo.data.encode.encoder import EncodedPair, EncodedPairs
from vlmpo.log import logger
from vlmpo.train.batching import MicroBatch, lay_out
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
) -> bool:
    """Read one pair as the run does and as the model does; return False, and say so, if shared rows differ.

    Args:
        pairs: the training pairs. Without a usable one there is nothing to check.
        model: the policy, set up by ``install``, under no wrapper.
        shared: whether the run shares prompts.
        prepare: moves a micro-batch to the device.
        half: whether the run computes in a half-precision type by autocast.
        wrapped: called in the model's place, if a wrapper holds its weights.

    Raises:
        ModelError: even separate rows are not what the model itself says.
    """
    usable = (item for item in map(pairs.__getitem__, range(len(pairs))) if isinstance(item, EncodedPair))
    pair = max(itertools.islice(usable, _LOOKED_AT), key=lambda item: bool(item.vision), default=None)
    if pair is None:
        return True
    shared_rows, separate_rows = (prepare(lay_out([pair], way)).rows for way in (True, False))
    difference = check_rows(model, shared_rows if shared else None, separate_rows, half, wrapped)
    if difference is None:
        return True
    logger.info(
        f"NOT sharing the prompt between responses: on {pair.origin or 'the first pair'} shared and separate rows "
        f"differ by {difference:.3g} nats a token. Each response is read in a row of its own."
    )
    return False
