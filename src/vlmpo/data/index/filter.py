"""Find the pairs of a data set that can be used, and hold some of them out from training."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.dataset import PairDataset, ScannedSource
from vlmpo.data.encode.images import missing_file
from vlmpo.data.index.record_index import Hashes, Indices, RecordIndex
from vlmpo.data.index.scan import Progress
from vlmpo.data.index.store import ignore
from vlmpo.data.readers.near_root import LOOKED_FOR, root_of
from vlmpo.errors import RecipeError
from vlmpo.hashing import stable_hash

# A folder of which fewer files are wanted is not listed: it may hold millions of others.
MIN_LISTED = 32


@dataclass(frozen=True, slots=True)
class Dropped:
    """Names a pair that cannot be used: its index in the data set, ``file:line``, and the fault."""

    index: int
    origin: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Screening:
    """Holds the result of :func:`screen`.

    Attributes:
        kept: int64 [kept], indices of the pairs that can be used, ascending.
        dropped: the other pairs, in order.
        read: number of pairs, kept or dropped, by name of every source; a repeated pair counts each time.
        roots: by name of a source of whose files most are missing: a folder near its image root that has them.
    """

    kept: Indices
    dropped: list[Dropped]
    read: dict[str, int]
    roots: dict[str, str] = field(default_factory=dict)


def screen(
    dataset: PairDataset,
    *,
    progress: Progress = ignore,
    waiting: Callable[[str], None] = ignore,
) -> Screening:
    """Find the pairs whose record can be used and whose images and videos exist; opens none of these.

    Faults of a record itself are found by reading it once. For a large data set they are kept in the cache: the next
    time nothing is read, and only the images are looked for again.

    Args:
        dataset: the pairs.
        progress: called now and then, and at the end, with (records read, records in all).
        waiting: called with the path of a source that another process is reading, before waiting for it.
    """
    read, roots = {}, {}
    is_kept = np.ones(len(dataset), np.bool_)
    dropped: list[Dropped] = []
    for source in dataset.scan(progress, waiting):
        index = source.index
        missing = find_missing(index)
        is_missing = np.zeros(index.media_count, np.bool_)
        is_missing[list(missing)] = True
        for row in np.flatnonzero(index.is_bad | index.shows_any(is_missing)).tolist():
            if index.is_bad[row]:
                reason, detail = index.error(row)
            else:
                shown = index.shown(row)
                reason, detail = missing[int(shown[is_missing[shown]][0])]
            pair = int(source.pairs[row])
            is_kept[pair] = False
            dropped.append(Dropped(pair, dataset.origin(pair), reason, detail))
        read[source.name] = len(index)
        if len(missing) * 2 > index.media_count and (root := _better_root(source, missing)):
            roots[source.name] = root
    dropped.sort(key=lambda pair: pair.index)
    return Screening(np.flatnonzero(is_kept), dropped, read, roots)


def find_missing(index: RecordIndex) -> dict[int, tuple[str, str]]:
    """Look for the image and video files of an index now, as ``os.path.isfile`` does.

    Returns:
        For the number of each that is not there: reason and detail of the RecordError.
    """
    in_folder: dict[str, list[int]] = defaultdict(list)
    for number, medium in index.shown_media():
        if not medium.is_embedded:
            in_folder[medium.name.rpartition(os.sep)[0]].append(number)
    missing = {}
    for folder, numbers in in_folder.items():
        media = np.array(numbers)
        listed: set[str] = set()
        if len(numbers) >= MIN_LISTED:
            names = {medium.name.rpartition(os.sep)[2] for _, medium in index.describe(media)}
            listed = _files_in(folder or os.sep, names)
        for number, (kind, _, path) in index.describe(media):
            # The others are looked up: names that differ in case or form from the listed ones may exist.
            if path.rpartition(os.sep)[2] not in listed and not os.path.isfile(path):
                error = missing_file(path, "", kind)
                missing[number] = error.reason, error.detail
    return missing


def _better_root(source: ScannedSource, missing: dict[int, tuple[str, str]]) -> str | None:
    """Look near a source's image root for the first of its missing files."""
    paths = [medium.name for _, medium in source.index.describe(np.array(sorted(missing)[:LOOKED_FOR]))]
    return root_of(paths, source.image_root)


def _files_in(folder: str, names: Container[str]) -> set[str]:
    """Return those of ``names`` that are files in ``folder``; none if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            # Following a link costs a look at its target, so only wanted ones are followed.
            return {entry.name for entry in entries if entry.name in names and entry.is_file()}
    except (OSError, ValueError):
        return set()


def split_hold_out(
    dataset: PairDataset, indices: NDArray[Any] | Sequence[int], fraction: float, seed: int
) -> tuple[Indices, Indices]:
    """Split pairs so that no image or video, and no text-only prompt, is on both sides.

    Whole groups (pairs that share an image, directly or through other pairs; text-only pairs of one prompt) are held
    out, in an order drawn by ``seed``, until they hold at least ``fraction`` of the pairs. The draw hashes image paths
    below the sources' common folder, and the content of embedded images, so it depends neither on the order of records
    nor on where the data are. An image that one source embeds and another names counts as two.

    Args:
        dataset: the data set that holds the pairs.
        indices: int64 [n], the pairs to split; all must be readable, e.g. ``Screening.kept``.
        fraction: from 0 (nothing held out) to below 1.
        seed: seed of the draw.

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
    groups, group_of, sizes = np.unique(_groups(dataset.select(indices)), return_inverse=True, return_counts=True)
    order = np.argsort(
        np.fromiter((stable_hash(f"{seed}:{group}") for group in groups.tolist()), np.uint64, len(groups))
    )
    needed = int(np.searchsorted(np.cumsum(sizes[order]), fraction * len(indices))) + 1  # groups to reach the fraction
    if needed >= len(groups):
        raise RecipeError(
            f"hold_out {fraction}: the {len(indices)} pairs form {len(groups)} groups that share no image, too few to "
            "hold some out and train on others; use less, or name a separate file under data.eval"
        )
    is_held = np.zeros(len(groups), np.bool_)
    is_held[order[:needed]] = True
    return indices[~is_held[group_of]], indices[is_held[group_of]]


def _groups(pairs: PairDataset) -> Hashes:
    """Return uint64 [pairs], equal for two pairs if and only if images link them (by 64-bit hashes of the images)."""
    root = pairs.common_root()
    keys = np.zeros(len(pairs), np.uint64)
    is_bad = np.zeros(len(pairs), np.bool_)
    links: list[Hashes] = [np.empty((0, 2), np.uint64)]  # [links, 2]: keys of two images of one pair
    for source in pairs.scan():
        index = source.index
        key_of = np.zeros(index.media_count, np.uint64)
        for number, medium in index.shown_media():
            path = "" if medium.is_embedded else os.path.normpath(medium.name).removeprefix(root)
            key_of[number] = stable_hash(f"bytes:{medium.name}" if medium.is_embedded else f"image:{path}")
        counts = np.diff(index.bounds)
        has_media = counts > 0
        is_bad[source.pairs] = index.is_bad
        first = key_of[index.media[index.bounds[:-1][has_media]]]  # of each row that shows any
        row_keys = index.prompts.copy()
        row_keys[has_media] = first
        keys[source.pairs] = row_keys
        linked = np.stack([np.repeat(first, counts[has_media]), key_of[index.media]], axis=1)
        links.append(linked[linked[:, 0] != linked[:, 1]])
    for pair in np.flatnonzero(is_bad)[:1].tolist():
        pairs[pair]  # raises
    return _linked(keys, np.concatenate(links))


def _linked(keys: Hashes, links: Hashes) -> Hashes:
    """Return for each of ``keys`` the smallest key that ``links`` [links, 2] tie to it, directly or through others."""
    if not len(links):
        return keys
    nodes, flat = np.unique(links, return_inverse=True)
    one, other = flat.reshape(-1, 2).T
    lowest = np.arange(len(nodes))  # the smallest node known to be tied to each
    while np.any(lowest[one] != lowest[other]):
        low = np.minimum(lowest[one], lowest[other])
        np.minimum.at(lowest, np.maximum(lowest[one], lowest[other]), low)
        while not np.array_equal(lowest, lowest[lowest]):
            lowest = lowest[lowest]
    at = np.minimum(np.searchsorted(nodes, keys), len(nodes) - 1)
    return np.where(nodes[at] == keys, nodes[lowest[at]], keys)
