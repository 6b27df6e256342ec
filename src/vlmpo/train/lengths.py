"""Estimate how long each pair is and what it costs to read, to share pairs out evenly among ranks.

No pair is tokenised and no image is decoded: estimates are made from the bytes of the texts and from the sizes in the
images' headers. A few pairs are encoded to measure how many tokens a byte and an image make. Image tokens are counted
by the processor, text tokens are estimated. Estimates decide which rank reads a pair, never whether it is read: a wrong
one costs time, not correctness.

A pair costs its tokens times the text model's parameters and its patches times the vision tower's, by the passes each
of them takes part in. Left out: attention's quadratic part, the head and the projector.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.dataset import PairDataset
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.encode.images import size_in_header
from vlmpo.data.encode.processors import TILE_PIXELS, Size, count_image_tokens, reads_images
from vlmpo.data.index.store import Cache, Stamp
from vlmpo.data.records import IMAGE_PLACEHOLDER, PreferencePair
from vlmpo.errors import RecordError
from vlmpo.log import logger
from vlmpo.models.families import part_of
from vlmpo.train.sampler import PairCosts
from vlmpo.train.sharding import all_gather_object, broadcast_object

Lengths = NDArray[np.int32]  # [pairs, 3], each row a PairLength

_ENCODED = 16  # pairs encoded to measure rates, those with images first
_SAMPLED = 256  # pairs among which these are chosen
# A pair counts as too long if its estimate is this many times max_length; below that it may fit.
_TOO_LONG = 1.2
_FRAME = Size(int(TILE_PIXELS**0.5), int(TILE_PIXELS**0.5))  # assumed size of a video's frames
_PATCH_SIZE = 14  # pixels, if the config does not give it
_BLOCK = 64  # neighbouring pairs that one rank estimates, as they may share images
_NOTICE_EVERY = 10.0  # seconds


class PairLength(NamedTuple):
    """Estimates the tokens of a pair's prompt, those of all its responses, and the patches of its images."""

    prompt: int
    responses: int
    patches: int


UNUSABLE = PairLength(0, 0, 0)


class Rates(NamedTuple):
    """Holds the ratios that were measured on some pairs.

    Attributes:
        bytes_per_token: bytes of a response per token.
        overhead: tokens that the chat template adds to a prompt.
        tokens, patches: tokens and patches per image unit (see :meth:`LengthEstimator.image_units`).
    """

    bytes_per_token: float = 4.0
    overhead: float = 0.0
    tokens: float = 1.0
    patches: float = 0.0


class LengthEstimator:
    """Estimates the lengths of pairs as ``encoder`` would encode them."""

    def __init__(self, encoder: PairEncoder, rates: Rates) -> None:
        self.encoder = encoder
        self.rates = rates
        # Neighbours often share an image, and images a size.
        self._header = functools.lru_cache(4096)(size_in_header)
        self._tokens = functools.lru_cache(65536)(functools.partial(count_image_tokens, encoder.processor))

    def estimate(self, pair: PreferencePair) -> PairLength:
        """Return the estimated length of ``pair``, UNUSABLE if it cannot be trained on."""
        units, rates, encoder = self.image_units(pair), self.rates, self.encoder
        if units is None:
            return UNUSABLE
        prompt = max(1, round(rates.overhead + _prompt_bytes(pair) / rates.bytes_per_token + rates.tokens * units))
        lengths = [1 + round(size / rates.bytes_per_token) for size in _response_bytes(pair, encoder)]
        limit = encoder.max_length
        if limit is not None and prompt + max(lengths) > limit:
            if encoder.over_long == "cut":
                lengths = [min(length, limit - prompt) for length in lengths]
            if min(lengths) < 1 or (encoder.over_long == "drop" and prompt + max(lengths) > _TOO_LONG * limit):
                return UNUSABLE
        return PairLength(prompt, sum(lengths), round(rates.patches * units))

    def image_units(self, pair: PreferencePair) -> int | None:
        """Return the number of image tokens that the processor predicts for ``pair``; if it cannot, that of images.

        None if the processor reads no images, or if one of these cannot be read.
        """
        if not pair.images and not pair.videos:
            return 0
        if not reads_images(self.encoder.processor):
            return None
        sizes = []
        for image in pair.images:
            size = self._header(os.fspath(image)) if isinstance(image, str | os.PathLike) else size_in_header(image)
            if size is None:
                return None
            sizes.append(Size(*size))
        sizes += [_FRAME] * (self.encoder.video_frames * len(pair.videos))
        tokens = self._tokens(self.encoder.tiles_of(pair), tuple(sizes))
        return len(sizes) if tokens is None else tokens


def measure_rates(encoder: PairEncoder, pairs: Iterable[PreferencePair], patch_pixels: int) -> Rates:
    """Encode a few of ``pairs`` and measure how many tokens and patches their texts and images make.

    Args:
        encoder: encoder of the run, with pixels normalised by the processor.
        pairs: pairs to choose from.
        patch_pixels: pixels in one patch of the vision tower.

    Raises:
        DataError: a pair holds a video, and the library that reads videos is not installed.
    """
    unbounded = copy.copy(encoder)
    unbounded.max_length = None
    image_units = LengthEstimator(encoder, Rates()).image_units
    totals: Counter[str] = Counter()
    for pair in sorted(pairs, key=lambda pair: not (pair.images or pair.videos)):
        units = image_units(pair)
        if units is None or totals["pairs"] == _ENCODED:
            continue
        with contextlib.suppress(RecordError):
            encoded = unbounded.encode(pair)
            responses = [ids for ids in (encoded.chosen_ids, encoded.rejected_ids) if ids is not None]
            totals["pairs"] += 1
            totals["response bytes"] += sum(_response_bytes(pair, encoder))
            totals["response tokens"] += sum(ids.numel() - 1 for ids in responses)  # the end-of-turn token has no byte
            totals["prompt bytes"] += _prompt_bytes(pair)
            totals["prompt tokens"] += encoded.prompt_ids.numel()
            totals["units"] += units
            totals["image tokens"] += encoded.image_tokens
            totals["patches"] += _count_patches(encoded, patch_pixels)
    if not totals["pairs"]:
        return Rates()
    bytes_per_token = max(totals["response bytes"], 1) / max(totals["response tokens"], 1)
    text_tokens = totals["prompt tokens"] - totals["image tokens"]
    return Rates(
        bytes_per_token=bytes_per_token,
        overhead=(text_tokens - totals["prompt bytes"] / bytes_per_token) / totals["pairs"],
        tokens=totals["image tokens"] / totals["units"] if totals["units"] else 1.0,
        patches=totals["patches"] / totals["units"] if totals["units"] else 0.0,
    )


def _prompt_bytes(pair: PreferencePair) -> int:
    texts = (message.text.replace(IMAGE_PLACEHOLDER, "") for message in pair.prompt)
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def _response_bytes(pair: PreferencePair, encoder: PairEncoder) -> list[int]:
    texts = (pair.chosen, pair.rejected if encoder.need_rejected else None)
    return [len(text.encode("utf-8", "surrogatepass")) for text in texts if text is not None]


def _count_patches(encoded: EncodedPair, patch_pixels: int) -> int:
    pixels = encoded.vision.get("pixel_values")
    if pixels is None:
        return 0
    if pixels.dim() < 4:  # the Qwen-VL families: patches of all images in one list
        return pixels.shape[0]
    return encoded.tiles * (pixels.shape[-1] * pixels.shape[-2] // patch_pixels)


# ---- a whole data set ----


def estimate_lengths(pairs: Any, *, encoder: PairEncoder, patch_pixels: int, accelerator: Any) -> Lengths:
    """Return the estimated lengths of ``pairs``: each rank estimates a share of them, and all get the same array.

    Records that cannot be read are UNUSABLE. The lengths of a large data set in files are kept in the cache folder;
    there an image whose size changes later is not noticed.

    Args:
        pairs: the data set.
        encoder: of the run.
        patch_pixels: pixels in one patch of the vision tower.
        accelerator: of the run; all its ranks must call this together.

    Raises:
        DataError: see :func:`measure_rates`.
    """
    sample = []
    for index in np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), _SAMPLED)).astype(int)).tolist():
        with contextlib.suppress(RecordError):
            sample.append(pairs[index])
    rates: Rates = broadcast_object(accelerator, measure_rates(encoder, sample, patch_pixels))

    cache, stamp, settings = Cache(), None, []
    if accelerator.is_main_process and isinstance(pairs, PairDataset):
        stamp, images = Stamp.of(pairs.paths), getattr(encoder.processor, "image_processor", None)
        settings = [
            *(pairs.fingerprint(), encoder.need_rejected, encoder.max_length, encoder.over_long),
            *(encoder.tiles_key(pairs.tile_limits), encoder.video_frames, *rates, type(encoder.processor).__name__),
            "" if images is None else json.dumps(images.to_dict(), sort_keys=True, default=str),
        ]
    kept = broadcast_object(accelerator, cache.find("sizes", stamp, settings))
    if kept is not None:
        return np.stack([kept[name] for name in PairLength._fields], axis=1)

    ranks, estimator = accelerator.num_processes, LengthEstimator(encoder, rates)
    reader = np.arange(len(pairs)) // _BLOCK % ranks  # which rank estimates each pair
    share = _estimate_share(pairs, np.flatnonzero(reader == accelerator.process_index), estimator)
    lengths = np.zeros((len(pairs), len(UNUSABLE)), np.int32)
    for rank, part in enumerate(all_gather_object(accelerator, share)):
        lengths[reader == rank] = part
    cache.keep("sizes", stamp, settings, dict(zip(PairLength._fields, lengths.T, strict=True)))
    return lengths


def _estimate_share(pairs: Any, indices: NDArray[np.int64], estimator: LengthEstimator) -> Lengths:
    """Estimate the pairs at ``indices``, with a notice now and then if it takes long."""
    lengths = np.zeros((len(indices), len(UNUSABLE)), np.int32)
    last_notice = time.monotonic()
    for at, index in enumerate(indices.tolist()):
        if time.monotonic() - last_notice > _NOTICE_EVERY:
            last_notice = time.monotonic()
            logger.info(f"ranks: estimating the lengths of pairs, to share them out evenly: {at / len(indices):.0%}")
        with contextlib.suppress(RecordError):
            lengths[at] = estimator.estimate(pairs[index])
    return lengths


# ---- costs ----


def pair_costs(lengths: Lengths, *, tokens_per_patch: float, num_responses: int, shared: bool) -> PairCosts:
    """Return what each pair costs, in tokens of the text model.

    Args:
        lengths: of the pairs.
        tokens_per_patch: see :func:`measure_tokens_per_patch`.
        num_responses: scored in each pair.
        shared: whether a prompt is read once for all its responses.
    """
    prompt_tokens, response_tokens, patches = lengths.T.astype(np.float64)
    prompt = prompt_tokens + tokens_per_patch * patches
    pair = response_tokens + prompt * (1 if shared else num_responses)
    saved = prompt if shared else np.zeros_like(prompt)
    return PairCosts(np.rint(pair).astype(np.int32), np.rint(saved).astype(np.int32))


def measure_tokens_per_patch(model: Any) -> float:
    """Return how many tokens through ``model``'s text model take as much work as a patch through its vision tower."""
    lookups = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    left_out = {id(parameter) for module in lookups for parameter in module.parameters()}
    text_config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    num_experts = next((count for name in names if (count := getattr(text_config, name, None))), None)
    active = getattr(text_config, "num_experts_per_tok", num_experts) / num_experts if num_experts else 1.0
    weights: dict[str, float] = defaultdict(float)  # multiply-adds for each token or patch
    trained: dict[str, float] = defaultdict(float)
    for name, parameter in model.named_parameters():
        if id(parameter) not in left_out:
            size = getattr(parameter, "ds_numel", parameter.numel()) * (active if ".experts." in name else 1.0)
            weights[part_of(name)] += size
            trained[part_of(name)] += size * parameter.requires_grad
    if not weights["text"]:
        return 0.0
    # Forward, backward to the inputs, backward to the weights. A tower in which nothing trains has no backward.
    vision = 2 * weights["vision"] + trained["vision"] if trained["vision"] else weights["vision"]
    return vision / (2 * weights["text"] + trained["text"])


def count_patch_pixels(model: Any) -> int:
    """Return how many pixels one patch of ``model``'s vision tower has."""
    size = getattr(getattr(model.config, "vision_config", None), "patch_size", None) or _PATCH_SIZE
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height) * int(width)
