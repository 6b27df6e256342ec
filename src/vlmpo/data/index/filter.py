"""A whole data set gone through once: which pairs can be used, and which of them are held out from training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.dataset import PairDataset, SourceRows
from vlmpo.data.index.hashing import stable_hash
from vlmpo.data.index.presence import NO_FILE, presence
from vlmpo.data.index.record_index import EMBEDDED_IMAGE, IMAGE, Hashes, Indices, RecordIndex, take_pieces
from vlmpo.errors import RecipeError


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
        dropped: the others, in order; made when they are looked at.
        sources: counts by source name, every source of the data set among them.
    """

    kept: Indices
    dropped: Sequence[Dropped]
    sources: dict[str, SourceCounts]

    def counts(self) -> dict[str, int]:
        """Dropped pairs by reason, the most frequent first."""
        return dict(Counter(drop.reason for drop in self.dropped).most_common())


def screen(
    dataset: PairDataset,
    *,
    need_rejected: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    waiting: Callable[[str], None] | None = None,
) -> Screening:
    """Whether every record can be used and its images and videos are there; opens none of them.

    What is wrong with a record itself is found by reading it once, and of a large data set kept in the cache: the next
    time nothing is read, and only the images are looked for again.

    Args:
        dataset: what to read.
        need_rejected: in place of the data set's own setting; None keeps that.
        progress: called now and then, and at the end, with (records read, records in all).
        waiting: called with the path of a source that another process reads just now; its result is waited for.
    """
    if need_rejected is not None:
        dataset = dataset.for_training(need_rejected)
    sources = {name: SourceCounts() for name in dataset.source_names}
    is_kept = np.ones(len(dataset), np.bool_)
    faults = []
    for rows in dataset.surveyed(progress, waiting):
        found = _source_faults(rows)
        is_kept[found.at] = False
        counts = sources[rows.name]
        counts.read, counts.kept = len(rows.at), len(rows.at) - len(found.at)
        counts.dropped = dict(Counter(found.reason(place) for place in range(len(found.at))))
        faults.append(found)
    return Screening(np.flatnonzero(is_kept), _DroppedPairs(dataset, faults), sources)


class _Faults(NamedTuple):
    """Pairs of one source that cannot be used.

    Attributes:
        at: int64 [dropped], which pairs of the data set, ascending.
        places: int64 [dropped], of a bad record its place in ``RecordIndex.bad``; else -1 - (number of the first absent
            image or video).
        facts, presence: of the source.
    """

    at: Indices
    places: Indices
    facts: RecordIndex
    presence: NDArray[np.uint8]

    def reason(self, index: int) -> str:
        """Why pair ``at[index]`` cannot be used, in a word."""
        place = int(self.places[index])
        if place >= 0:
            return self.facts.reasons.at(place)
        return "missing_image" if self.facts.kinds[-1 - place] == IMAGE else "missing_video"

    def detail(self, index: int) -> str:
        """The same in a sentence."""
        place = int(self.places[index])
        if place >= 0:
            return self.facts.details.at(place)
        kind = "image" if self.facts.kinds[-1 - place] == IMAGE else "video"
        what = "is not a file" if self.presence[-1 - place] == NO_FILE else "does not exist"
        return f"{kind} {self.facts.names.at(-1 - place)} {what}; check the image root and the record's `{kind}`"


def _source_faults(rows: SourceRows) -> _Faults:
    """What is wrong with the pairs of one source."""
    facts = rows.facts
    positions = facts.positions(rows.records)
    present = presence(facts, facts.shown(take_pieces(facts.bounds, facts.media, positions)[1]))
    fault = np.zeros(len(facts.records), np.int64)  # 0: none; else 1 + place, or the place of an absent medium
    absent = np.flatnonzero(present[facts.media])[::-1]  # of a record's absent ones the first is written last
    fault[np.searchsorted(facts.bounds, absent, side="right") - 1] = -1 - facts.media[absent].astype(np.int64)
    fault[facts.bad] = 1 + np.arange(len(facts.bad))
    found = fault[positions]
    at = np.flatnonzero(found)
    places = found[at]
    return _Faults(rows.at[at], np.where(places > 0, places - 1, places), facts, present)


class _DroppedPairs(Sequence[Dropped]):
    """The dropped pairs of all sources in the data set's order, each made when it is asked for."""

    def __init__(self, dataset: PairDataset, faults: Sequence[_Faults]) -> None:
        self._dataset = dataset
        self._faults = faults
        at = np.concatenate([np.empty(0, np.int64), *(found.at for found in faults)])
        source = np.repeat(np.arange(len(faults)), [len(found.at) for found in faults])
        within = np.concatenate([np.empty(0, np.int64), *(np.arange(len(found.at)) for found in faults)])
        order = np.argsort(at, kind="stable")
        self._source, self._within = source[order], within[order]

    def __len__(self) -> int:
        return len(self._within)

    @overload
    def __getitem__(self, index: int) -> Dropped: ...

    @overload
    def __getitem__(self, index: slice) -> list[Dropped]: ...

    def __getitem__(self, index: int | slice) -> Dropped | list[Dropped]:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        found, within = self._faults[self._source[index]], int(self._within[index])
        pair = int(found.at[within])
        return Dropped(pair, self._dataset.origin(pair), found.reason(within), found.detail(within))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


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
    order = np.argsort(
        np.fromiter((stable_hash(f"{seed}:{group}") for group in groups.tolist()), np.uint64, len(groups))
    )
    needed = int(np.searchsorted(np.cumsum(sizes[order]), fraction * len(indices))) + 1  # groups to reach the fraction
    if needed >= len(groups):
        raise RecipeError(
            f"hold_out {fraction}: the {len(indices)} pairs form {len(groups)} groups that share no image, too few to "
            "hold some out and train on others; use less, or name a separate file under data.eval"
        )
    held = np.zeros(len(groups), np.bool_)
    held[order[:needed]] = True
    return indices[~held[group_of]], indices[held[group_of]]


def _groups(dataset: PairDataset, indices: Indices) -> Hashes:
    """uint64 [n]: equal for two pairs if and only if they are linked by images (64-bit hashes, not the paths)."""
    root = dataset.common_root()
    keys = np.zeros(len(dataset), np.uint64)
    is_bad = np.zeros(len(dataset), np.bool_)
    links: list[Hashes] = [np.empty((0, 2), np.uint64)]  # [links, 2]: keys of images that stand in one pair
    asked = np.zeros(len(dataset), np.bool_)
    asked[indices] = True
    for rows in dataset.surveyed():
        facts, is_asked = rows.facts, asked[rows.at]
        at, positions = rows.at[is_asked], facts.positions(rows.records[is_asked])
        is_bad[at] = np.isin(positions, facts.bad)
        bounds, media = take_pieces(facts.bounds, facts.media, positions)
        named = _media_keys(facts, media, root)[media]
        counts = np.diff(bounds)
        first = bounds[:-1][counts > 0]
        keys[at] = facts.texts[positions]
        keys[at[counts > 0]] = named[first]
        is_first = np.zeros(len(named), np.bool_)
        is_first[first] = True
        links.append(np.stack([np.repeat(named[first], counts[counts > 0]), named], axis=1)[~is_first])
    bad = np.flatnonzero(is_bad[indices])
    if len(bad):
        dataset[int(indices[bad[0]])]  # raises
    return _linked(keys[indices], np.concatenate(links))


def _media_keys(facts: RecordIndex, media: NDArray[Any], root: str) -> Hashes:
    """uint64 [media of the source]: what stands for an image or video that one of ``media`` names; 0 for others.

    Its path below ``root``, or its content where it is embedded.
    """
    keys = np.zeros(len(facts.keys), np.uint64)
    shown = facts.shown(media)
    embedded = np.flatnonzero(shown & (facts.kinds >= EMBEDDED_IMAGE))
    paths = np.flatnonzero(shown & (facts.kinds < EMBEDDED_IMAGE))
    for at, name in zip(embedded.tolist(), facts.names.texts(embedded), strict=True):
        keys[at] = stable_hash(f"bytes:{name}")
    for at, name in zip(paths.tolist(), facts.names.texts(paths), strict=True):
        keys[at] = stable_hash(f"image:{os.path.normpath(name).removeprefix(root)}")
    return keys


def _linked(keys: Hashes, links: Hashes) -> Hashes:
    """``keys`` with the smallest key of its group for each; ``links`` [links, 2] tie groups together."""
    if not len(links):
        return keys
    nodes, flat = np.unique(links, return_inverse=True)
    one, other = flat.reshape(-1, 2).T
    lowest = np.arange(len(nodes))  # the smallest node known to be tied to each, whose own is itself
    while len(np.flatnonzero(lowest[one] != lowest[other])):
        low = np.minimum(lowest[one], lowest[other])
        np.minimum.at(lowest, np.maximum(lowest[one], lowest[other]), low)
        while not np.array_equal(lowest, lowest[lowest]):
            lowest = lowest[lowest]
    at = np.minimum(np.searchsorted(nodes, keys), len(nodes) - 1)
    return np.where(nodes[at] == keys, nodes[lowest[at]], keys)
