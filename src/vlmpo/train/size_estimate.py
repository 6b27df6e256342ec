"""How large pairs will be, from their texts' bytes and their images' headers: nothing is tokenised or decoded.

A few pairs are encoded in earnest to see what a byte and an image come to; the rest is arithmetic. Image tokens are as
exact as the processor's own count, text is not. So this may decide who reads a pair, never whether it is read.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.encode.images import size_in_header
from vlmpo.data.encode.processors import TILE_PIXELS, Size, count_image_tokens, reads_images
from vlmpo.data.records import IMAGE_PLACEHOLDER, PreferencePair
from vlmpo.errors import RecordError

_CALIBRATED = 16  # pairs encoded in earnest, those with images first
_LOOKED_AT = 256  # pairs among which they are sought
# Only what is surely too long counts as dropped: of what is near the limit much is read.
_SURELY = 1.2
_FRAME = Size(int(TILE_PIXELS**0.5), int(TILE_PIXELS**0.5))  # a video's frames are taken to be of this size


class EstimatedSize(NamedTuple):
    """Tokens of the prompt and of both responses, and patches the vision tower reads; all 0 for an unusable pair."""

    prompt: int
    responses: int
    patches: int


NOTHING = EstimatedSize(0, 0, 0)


class Rates(NamedTuple):
    """What pairs come to, as measured on some of them.

    Attributes:
        bytes_per_token: of responses.
        overhead: tokens of a prompt beyond its text and images: the chat template.
        tokens, patches: for each image token the processor foretells, or for each image where it cannot.
    """

    bytes_per_token: float = 4.0
    overhead: float = 0.0
    tokens: float = 1.0
    patches: float = 0.0


def sample(count: int) -> list[int]:
    """Which of ``count`` pairs to look at for :func:`measured`: spread evenly over all."""
    return np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(int)).tolist() if count else []


class SizeEstimator:
    """Estimates pairs as ``encoder`` would encode them.

    Args:
        encoder: of the run.
        rates: of its model on these data.
    """

    def __init__(self, encoder: PairEncoder, rates: Rates) -> None:
        self.encoder = encoder
        self.rates = rates
        # Neighbours often share an image, and images a size.
        self._header = functools.lru_cache(4096)(size_in_header)
        self._tokens = functools.lru_cache(65536)(functools.partial(count_image_tokens, encoder.processor))

    @classmethod
    def measured(cls, encoder: PairEncoder, pairs: Iterable[PreferencePair], patch_pixels: int) -> SizeEstimator:
        """One with rates measured on some of ``pairs``.

        Args:
            encoder: of the run; its pixels are the processor's own.
            pairs: among which to choose.
            patch_pixels: pixels of one of the vision tower's patches.

        Raises:
            DataError: a pair holds a video, and the library that reads videos is not installed.
        """
        unbounded = copy.copy(encoder)
        unbounded.max_length = None
        plain = cls(encoder, Rates())
        measures = []
        for pair in sorted(pairs, key=lambda pair: not (pair.images or pair.videos)):
            units = plain._units(pair)
            if units is None:
                continue
            with contextlib.suppress(RecordError):
                measures.append((pair, units, unbounded.encode(pair)))
            if len(measures) == _CALIBRATED:
                break
        return cls(encoder, _rates(measures, encoder, patch_pixels))

    def size(self, pair: PreferencePair) -> EstimatedSize:
        """The size of ``pair``; nothing where it cannot be used."""
        units = self._units(pair)
        if units is None:
            return NOTHING
        rates = self.rates
        prompt = max(1, round(rates.overhead + _prompt_bytes(pair) / rates.bytes_per_token + rates.tokens * units))
        lengths = [1 + round(size / rates.bytes_per_token) for size in _response_bytes(pair, self.encoder)]
        limit = self.encoder.max_length
        if limit is not None and prompt + max(lengths) > limit:
            if self.encoder.over_long == "cut":
                lengths = [min(length, limit - prompt) for length in lengths]
            if min(lengths) < 1 or (self.encoder.over_long == "drop" and prompt + max(lengths) > _SURELY * limit):
                return NOTHING
        return EstimatedSize(prompt, sum(lengths), round(rates.patches * units))

    def _units(self, pair: PreferencePair) -> int | None:
        """Image tokens as the processor foretells them, or images where it cannot; None where it reads none."""
        if not pair.images and not pair.videos:
            return 0
        if not reads_images(self.encoder.processor):
            return None
        sizes = []
        for image in pair.images:
            found = self._header(os.fspath(image)) if isinstance(image, str | os.PathLike) else size_in_header(image)
            if found is None:
                return None
            sizes.append(Size(*found))
        sizes += [_FRAME] * (self.encoder.video_frames * len(pair.videos))
        tokens = self._tokens(self.encoder.tiles_of(pair), tuple(sizes))
        return len(sizes) if tokens is None else tokens


def _rates(
    measures: Sequence[tuple[PreferencePair, int, EncodedPair]], encoder: PairEncoder, patch_pixels: int
) -> Rates:
    if not measures:
        return Rates()
    pairs, units, encoded = zip(*measures, strict=True)
    spoken = sum(sum(_response_bytes(pair, encoder)) for pair in pairs)
    # The end-of-turn token has no byte in the record.
    said = sum(ids.numel() - 1 for one in encoded for ids in (one.chosen_ids, one.rejected_ids) if ids is not None)
    bytes_per_token = max(spoken, 1) / max(said, 1)
    known = sum(units)
    tokens = sum(one.image_tokens for one in encoded) / known if known else 1.0
    patches = sum(_patches(one, patch_pixels) for one in encoded) / known if known else 0.0
    rest = [
        one.prompt_ids.numel() - one.image_tokens - _prompt_bytes(pair) / bytes_per_token
        for pair, one in zip(pairs, encoded, strict=True)
    ]
    return Rates(bytes_per_token, sum(rest) / len(rest), tokens, patches)


def _prompt_bytes(pair: PreferencePair) -> int:
    return sum(_bytes(message.text.replace(IMAGE_PLACEHOLDER, "")) for message in pair.prompt)


def _response_bytes(pair: PreferencePair, encoder: PairEncoder) -> list[int]:
    return [
        _bytes(text) for text in (pair.chosen, pair.rejected if encoder.need_rejected else None) if text is not None
    ]


def _bytes(text: Any) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _patches(encoded: EncodedPair, patch_pixels: int) -> int:
    pixels = encoded.vision.get("pixel_values")
    if pixels is None:
        return 0
    if pixels.dim() < 4:  # the Qwen-VL families: patches of all images in one list
        return pixels.shape[0]
    return encoded.tiles * (pixels.shape[-1] * pixels.shape[-2] // patch_pixels)
