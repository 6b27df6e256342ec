"""A whole data set gone through once: which pairs can be used, and which of them are held out from training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.images import missing_image
from vlmpo.data.sources import Indices, PairDataset, stable_hash
from vlmpo.errors import RecipeError, RecordError


@dataclass(frozen=True, slots=True)
class Dropped:
    """A pair that cannot be used: its index in the data set, ``file:line``, and why."""

    index: int
    origin: str
    reason: str
    detail: str


@dataclass
class SourceCounts:
    """Pairs of one source: ``read == kept + sum(dropped.values())``; a pair repeated counts each time."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Screening:
    """What one pass over a data set found.

    Attributes:
        kept: int64 [kept], indices of the pairs that can be used, ascending.
        dropped: the others, in order.
        sources: counts by source name, every source of the data set among them.
    """

    kept: Indices
    dropped: list[Dropped]
    sources: dict[str, SourceCounts]

    def counts(self) -> dict[str, int]:
        """Dropped pairs by reason, the most frequent first."""
        return dict(Counter(drop.reason for drop in self.dropped).most_common())


def screen(
    dataset: PairDataset, *, need_rejected: bool | None = None, progress: Callable[[int, int], None] | None = None
) -> Screening:
    """Reads every record once and looks whether its images and videos are there; opens none.

    Args:
        dataset: what to read.
        need_rejected: in place of the data set's own setting; None keeps that.
        progress: called now and then, and at the end, with (records read, records in all).
    """
    if need_rejected is not None:
        dataset = dataset.for_training(need_rejected)
    is_file = lru_cache(maxsize=1 << 16)(os.path.isfile)  # pairs of one image mostly stand near each other
    is_kept = np.zeros(len(dataset), np.bool_)
    dropped: list[Dropped] = []
    sources = {name: SourceCounts() for name in dataset.source_names}
    for index in range(len(dataset)):
        counts = sources[dataset.source(index)]
        counts.read += 1
        try:
            pair = dataset[index]
            for image in pair.images:
                if isinstance(image, str) and not is_file(image):
                    raise missing_image(image, pair.origin)
            for video in pair.videos:
                if isinstance(video, str) and not is_file(video):
                    raise _missing_video(video, pair.origin)
            is_kept[index] = True
            counts.kept += 1
        except RecordError as error:
            dropped.append(Dropped(index, error.origin, error.reason, error.detail))
            counts.dropped[error.reason] = counts.dropped.get(error.reason, 0) + 1
        if progress and ((index + 1) % 1000 == 0 or index + 1 == len(dataset)):
            progress(index + 1, len(dataset))
    return Screening(np.flatnonzero(is_kept), dropped, sources)


def _missing_video(path: str, origin: str) -> RecordError:
    kind = "is not a file" if os.path.exists(path) else "does not exist"
    return RecordError("missing_video", origin, f"video {path} {kind}; check the image root and the record's `video`")


def split_hold_out(
    dataset: PairDataset, indices: NDArray[Any] | Sequence[int], fraction: float, seed: int
) -> tuple[Indices, Indices]:
    """Splits pairs so that no image or video, and no text-only prompt, stands on both sides.

    Whole groups (pairs that share an image, directly or through other pairs; text-only pairs of one prompt) are held
    out, in an order drawn by ``seed``, until they hold at least ``fraction`` of the pairs. The draw hashes image paths
    below the sources' common folder, and the content of embedded images, so it depends neither on the order of records
    nor on where the data lie. An image that one source embeds and another names is two images to it.

    Args:
        dataset: where the pairs are.
        indices: [n], the pairs to split; all must be readable, e.g. ``Screening.kept``.
        fraction: from 0 (nothing held out) to below 1.
        seed: another seed, another draw.

    Returns:
        (train, held out): two parts of ``indices``, each in the order given.

    Raises:
        RecipeError: a fraction out of range, or so few groups that nothing would be left to train on.
        RecordError: one of the pairs cannot be read.
    """
    if not 0 <= fraction < 1:
        raise RecipeError(f"hold_out must be from 0 to below 1, not {fraction!r}")
    indices = np.asarray(indices, np.int64)
    if fraction == 0 or not len(indices):
        return indices, indices[:0]
    groups, group_of, sizes = np.unique(_groups(dataset, indices), return_inverse=True, return_counts=True)
    order = np.argsort(np.array([stable_hash(f"{seed}:{group}") for group in groups], np.uint64))
    needed = int(np.searchsorted(np.cumsum(sizes[order]), fraction * len(indices))) + 1  # groups to reach the fraction
    if needed >= len(groups):
        raise RecipeError(
            f"hold_out {fraction}: the {len(indices)} pairs form {len(groups)} groups that share no image, too few to "
            "hold some out and train on others; use less, or name a separate file under data.eval"
        )
    held = np.zeros(len(groups), np.bool_)
    held[order[:needed]] = True
    return indices[~held[group_of]], indices[held[group_of]]


def _groups(dataset: PairDataset, indices: Indices) -> NDArray[np.uint64]:
    """uint64 [n]: equal for two pairs if and only if they are linked by images (64-bit hashes, not the paths)."""
    root = dataset.common_root()
    keys = np.empty(len(indices), np.uint64)
    parents: dict[int, int] = {}  # only what pairs of several images link; the smallest key stands for its group
    for position, index in enumerate(indices):
        pair = dataset[int(index)]
        names = [_media_name(medium, root) for medium in (*pair.images, *pair.videos)]
        text = "\n".join(message.text for message in pair.prompt)
        first, *others = [stable_hash(name) for name in names or [f"text:{text}"]]
        keys[position] = first
        for other in others:
            low, high = sorted((_root(parents, first), _root(parents, other)))
            if low != high:
                parents[high] = low
    if parents:
        keys = np.array([_root(parents, int(key)) for key in keys], np.uint64)
    return keys


def _media_name(medium: Any, root: str) -> str:
    """What stands for an image or video: its path, or its content where it is embedded."""
    if isinstance(medium, bytes):
        return f"bytes:{blake2b(medium, digest_size=16).hexdigest()}"
    return f"image:{os.path.normpath(medium).removeprefix(root)}"


def _root(parents: dict[int, int], key: int) -> int:
    """The key that stands for ``key``'s group; shortens the way for the next call."""
    while key in parents:
        parents[key] = parents.get(parents[key], parents[key])
        key = parents[key]
    return key
