"""What reading each pair of a data set costs, known alike to all ranks before training.

A pair costs its tokens times the text model's parameters and its patches times the vision tower's, by how much of the
passes each part takes part in. Attention's square, the head and the projector are left out. Costs decide which rank
reads a pair, nothing else: an estimate that is off costs time, never correctness.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vlmpo.data.dataset import PairDataset
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.index.store import Cache, Stamp
from vlmpo.data.records import PreferencePair
from vlmpo.errors import RecordError
from vlmpo.log import logger
from vlmpo.models.families import part_of
from vlmpo.train.balance import PairCosts
from vlmpo.train.sharding import all_gather_object, broadcast_object
from vlmpo.train.size_estimate import NOTHING, EstimatedSize, Rates, SizeEstimator, sample

Sizes = NDArray[np.int32]  # [pairs, 3]: a EstimatedSize each

_BLOCK = 64  # pairs that a rank sizes up in a row: neighbours share images
_PATIENCE = 10.0  # seconds between notices
_PATCH = 14  # pixels, where a config says nothing


def tokens_per_patch(model: nn.Module) -> float:
    """How many tokens through the text model a patch through the vision tower is worth."""
    work = {"text": 0.0, "vision": 0.0}
    for part, parameters in _parameters_of(model).items():
        whole = sum(size for size, _ in parameters)
        trained = sum(size for size, trains in parameters if trains)
        # Forward; backward to the inputs; backward to the weights. A tower in which nothing trains has no backward.
        passes = 1.0 if part == "vision" and not trained else 2.0 + trained / whole
        work[part] = whole * passes
    return work["vision"] / work["text"] if work["text"] else 0.0


def _parameters_of(model: Any) -> dict[str, list[tuple[float, bool]]]:
    """By part: how many multiply-adds each weight takes for a token or patch, and whether it trains."""
    looked_up = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = {id(parameter) for module in looked_up if module is not None for parameter in module.parameters()}
    active = _active_experts(model)
    found: dict[str, list[tuple[float, bool]]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in left_out:
            continue
        size = float(getattr(parameter, "ds_numel", parameter.numel()))
        if ".experts." in name:
            size *= active
        found.setdefault(part_of(name), []).append((size, parameter.requires_grad))
    return {part: found[part] for part in ("text", "vision") if part in found}


def _active_experts(model: Any) -> float:
    """The share of its experts that a mixture asks for a token."""
    text = model.config.get_text_config()
    counts = (getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    experts = next((count for count in counts if count), None)
    return getattr(text, "num_experts_per_tok", None) / experts if experts else 1.0


def patch_pixels(model: Any) -> int:
    """Pixels of one patch of the vision tower."""
    size = getattr(getattr(model.config, "vision_config", None), "patch_size", None) or _PATCH
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height) * int(width)


def costs_of(sizes: Sizes, patch: float, responses: int, shared: bool) -> PairCosts:
    """Costs in tokens of the text model.

    Args:
        sizes: of the pairs.
        patch: what a patch is worth, see :func:`tokens_per_patch`.
        responses: scored for each pair.
        shared: whether a prompt is read once for all its responses.
    """
    prompt, said, patches = (sizes[:, column].astype(np.float64) for column in range(3))
    shared_cost = prompt + patch * patches
    whole = said + shared_cost * (1 if shared else responses)
    return PairCosts(
        np.rint(whole).astype(np.int32), np.rint(shared_cost if shared else 0 * shared_cost).astype(np.int32)
    )


def sizes_of_all(accelerator: Any, pairs: Any, encoder: PairEncoder, patch: int) -> Sizes:
    """The sizes of ``pairs``, of which each rank reads its share; then all hold the same array.

    For a large data set they are kept in the cache folder. An image that changes its size goes unnoticed there.

    Args:
        accelerator: of the run; all its ranks must call this together.
        pairs: the data set.
        encoder: of the run.
        patch: pixels of a patch.

    Raises:
        DataError: see :meth:`SizeEstimator.measured`.
    """
    measured = SizeEstimator.measured(encoder, list(_readable(pairs, sample(len(pairs)))), patch)
    rates: Rates = broadcast_object(accelerator, measured.rates)
    kept = _Kept(pairs, encoder, rates) if accelerator.is_main_process else None
    found: Sizes | None = broadcast_object(accelerator, None if kept is None else kept.find())
    if found is not None:
        return found
    ranks = accelerator.num_processes
    blocks = np.arange(len(pairs)) // _BLOCK % ranks
    estimator = SizeEstimator(encoder, rates)
    parts = all_gather_object(
        accelerator, _read(pairs, np.flatnonzero(blocks == accelerator.process_index), estimator, ranks)
    )
    sizes = np.zeros((len(pairs), len(NOTHING)), np.int32)
    for rank, part in enumerate(parts):
        sizes[blocks == rank] = part
    if kept is not None:
        kept.keep(sizes)
    return sizes


def _readable(pairs: Any, indices: Sequence[int]) -> Iterator[PreferencePair]:
    for index in indices:
        try:
            yield pairs[index]
        except RecordError:
            continue


def _read(pairs: Any, indices: NDArray[np.int64], estimator: SizeEstimator, ranks: int) -> Sizes:
    sizes = np.zeros((len(indices), len(NOTHING)), np.int32)
    told = time.monotonic()
    for at, index in enumerate(indices.tolist()):
        if time.monotonic() - told > _PATIENCE:
            told = time.monotonic()
            logger.info(
                f"ranks: sizing up pairs by text and image headers, to share work out evenly: {at / len(indices):.0%}"
            )
        sizes[at] = _size(pairs, index, estimator)
    return sizes


def _size(pairs: Any, index: int, estimator: SizeEstimator) -> EstimatedSize:
    try:
        return estimator.size(pairs[index])
    except RecordError:
        return NOTHING


class _Kept:
    """Sizes in the cache folder, for data sets that lie in files."""

    def __init__(self, pairs: Any, encoder: PairEncoder, rates: Rates) -> None:
        self._cache = Cache()
        self._stamp = Stamp.of(pairs.paths) if isinstance(pairs, PairDataset) else None
        if self._stamp is not None:
            images = getattr(encoder.processor, "image_processor", None)
            self._settings = [
                *(pairs.fingerprint(), encoder.need_rejected, encoder.max_length, encoder.over_long),
                *(encoder.max_tiles, encoder.video_frames, *rates, type(encoder.processor).__name__),
                "" if images is None else json.dumps(images.to_dict(), sort_keys=True, default=str),
            ]

    def find(self) -> Sizes | None:
        found = None if self._stamp is None else self._cache.find("sizes", self._stamp, self._settings)
        if found is None:
            return None
        return np.stack([found[name] for name in EstimatedSize._fields], axis=1)

    def keep(self, sizes: Sizes) -> None:
        if self._stamp is not None:
            named = dict(zip(EstimatedSize._fields, sizes.T, strict=True))
            self._cache.keep("sizes", self._stamp, self._settings, named)
