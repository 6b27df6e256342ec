"""What stands in both training and evaluation data: figures on such items measure memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.dataset import PairDataset, SourceRows
from vlmpo.data.index.hashing import words_hash
from vlmpo.data.index.record_index import (
    EMBEDDED_IMAGE,
    IMAGE,
    Hashes,
    Indices,
    RecordIndex,
    RecordIndexBuilder,
    take_pieces,
)


class Item(NamedTuple):
    """A prompt as overlap sees it: its words, its images (paths, or bytes), and where it was read."""

    text: str
    images: tuple[Any, ...]
    origin: str


@dataclass(frozen=True)
class Overlap:
    """Evaluation items that training saw too.

    Attributes:
        items: evaluation items in all.
        with_seen_image: of these, items with an image whose content is also a training image.
        seen_whole: of these, items whose words and images together (words alone, where there are none) are also a
            training prompt.
        examples: origins of the first few such items.
    """

    items: int
    with_seen_image: int
    seen_whole: int
    examples: tuple[str, ...]

    def message(self, name: str) -> str | None:
        """One line for the user, or None where nothing is shared."""
        if not self.with_seen_image and not self.seen_whole:
            return None
        return (
            f"{name}: of {self.items} items, {self.with_seen_image} show an image that training shows too, and "
            f"{self.seen_whole} are whole prompts of the training data (e.g. {', '.join(self.examples)}); figures on "
            "them measure memory"
        )


def find_overlap(training: PairDataset | Iterable[Item], evaluation: PairDataset | Iterable[Item]) -> Overlap:
    """What of one evaluation set training saw too; see :func:`find_overlaps`."""
    return find_overlaps(training, {"": evaluation})[""]


def find_overlaps(
    training: PairDataset | Iterable[Item], evaluations: Mapping[str, PairDataset | Iterable[Item]]
) -> dict[str, Overlap]:
    """For each evaluation set by name, what of it training saw too.

    They are compared by content: images by a hash of their bytes, words with case and spaces evened out (both in 64
    bits). Of a training image no more than its size is asked unless an evaluation image has the same; then its first
    and last 4 KiB are read, and the whole only where these are the same too. A file that cannot be read equals none.
    """
    shown = _prompts(training)
    asked = {name: _prompts(items) for name, items in evaluations.items()}
    _find_contents(shown, [part for parts in asked.values() for part in parts])
    seen_images = np.unique(np.concatenate([np.empty(0, np.uint64), *(part.contents for part in shown)]))
    seen_images = seen_images[seen_images != _NO_CONTENT]
    words = np.concatenate([np.empty(0, np.uint64), *(part.words() for parts in asked.values() for part in parts)])
    seen_prompts: set[tuple[int, ...]] = set()
    for part in shown:
        seen_prompts.update(part.keys(np.isin(part.words(), words)).values())
    return {name: _overlap(parts, seen_images, seen_prompts) for name, parts in asked.items()}


# ---- prompts, and the contents of their images ----

_NO_CONTENT = 0  # of an image that cannot be read, or is like none on the other side
_PIXELS = -2  # in place of the size of a PIL image: its pixels are hashed
_MARKED = 4096


class _Prompts:
    """The prompts of one source.

    Attributes:
        facts: of the source.
        positions: int64 [prompts], where each stands in ``facts``.
        origin: where prompt ``i`` was read.
        used: int64 [used], the images and videos that any of them shows.
        sizes: int64 [used], their sizes; -1 where there is no such file, _PIXELS for a PIL image.
        contents: uint64 [used], what stands for their contents where that matters, else _NO_CONTENT.
    """

    def __init__(self, facts: RecordIndex, positions: Indices, origin: Callable[[int], str]) -> None:
        self.facts = facts
        self.positions = positions
        self.origin = origin
        self.bounds, media = take_pieces(facts.bounds, facts.media, positions)
        shown = facts.shown(media)
        self.used = np.flatnonzero(shown)
        self.media = (np.cumsum(shown) - 1)[media]  # int64 [bounds[-1]], into `used`
        self.is_embedded = facts.kinds[self.used] >= EMBEDDED_IMAGE
        self.sizes = facts.sizes[self.used].copy()
        paths = np.flatnonzero(~self.is_embedded)
        self.sizes[paths] = np.fromiter((_size(name) for name in self.names(paths)), np.int64, len(paths))
        self.contents = np.zeros(len(self.used), np.uint64)

    def names(self, at: Indices) -> Iterator[str]:
        """Paths or digests of the images ``used[at]``."""
        return self.facts.names.texts(self.used[at])

    def words(self) -> Hashes:
        """uint64 [prompts], hashes of their words."""
        return self.facts.words[self.positions]

    def shows(self, values: Hashes) -> NDArray[np.bool_]:
        """bool [prompts], whether any image's content is one of ``values``."""
        return _counted(np.isin(self.contents, values)[self.media], self.bounds) > 0

    def keys(self, wanted: NDArray[np.bool_]) -> dict[int, tuple[int, ...]]:
        """Words and contents of the prompts that are wanted and have all their images' contents, by number."""
        known = _counted((self.contents == _NO_CONTENT)[self.media], self.bounds) == 0
        found = {}
        for at in np.flatnonzero(wanted & known).tolist():
            shown = self.media[self.bounds[at] : self.bounds[at + 1]]
            found[at] = (int(self.facts.words[self.positions[at]]), *self.contents[shown].tolist())
        return found


def _counted(flags: NDArray[np.bool_], bounds: Indices) -> Indices:
    """int64 [pieces], how many of each piece's flags are set."""
    return np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(flags, dtype=np.int64)])[bounds])


def _prompts(items: PairDataset | Iterable[Item]) -> list[_Prompts]:
    if isinstance(items, PairDataset):
        return [_source_prompts(items, rows) for rows in items.surveyed()]
    found = RecordIndexBuilder()
    origins: list[str] = []
    for item in items:
        found.good(words_hash(item.text), 0, [_medium(image) for image in item.images])
        origins.append(item.origin or item.text[:40])
    count = np.arange(len(origins), dtype=np.int64)
    return [_Prompts(found.facts(count), count, origins.__getitem__)]


def _source_prompts(dataset: PairDataset, rows: SourceRows) -> _Prompts:
    return _Prompts(rows.facts, rows.facts.positions(rows.records), lambda at: dataset.origin(int(rows.at[at])))


def _medium(image: Any) -> tuple[int, str, int]:
    """Kind, name and size, as a survey has them."""
    if isinstance(image, str | os.PathLike):
        return IMAGE, os.fspath(image), -1
    if isinstance(image, bytes):
        return EMBEDDED_IMAGE, _digest(image), len(image)
    return EMBEDDED_IMAGE, _digest(image.tobytes()), _PIXELS


def _find_contents(training: list[_Prompts], evaluation: list[_Prompts]) -> None:
    """Set ``contents`` of all images that may have their like on the other side."""
    sides = (training, evaluation)
    shown, asked = (np.concatenate([np.empty(0, np.int64), *(part.sizes for part in side)]) for side in sides)
    common = np.intersect1d(shown, asked)
    common = common[common != -1]
    embedded = [np.concatenate([common[:0], *(part.sizes[part.is_embedded] for part in side)]) for side in sides]
    marks = [[_marks(part, common) for part in side] for side in sides]
    shown_marks, asked_marks = (np.concatenate([np.empty(0, np.uint64), *side]) for side in marks)
    alike = np.intersect1d(shown_marks, asked_marks)
    for side, others, side_marks in zip(sides, reversed(embedded), marks, strict=True):
        for part, part_marks in zip(side, side_marks, strict=True):
            may_match = np.isin(part.sizes, common) & (
                part.is_embedded | np.isin(part.sizes, others) | ((part_marks != 0) & np.isin(part_marks, alike))
            )
            chosen = np.flatnonzero(may_match)
            for at, name in zip(chosen.tolist(), part.names(chosen), strict=True):
                digest = name if part.is_embedded[at] else _file_digest(name)
                part.contents[at] = int(digest[:16], 16) or 1 if digest else _NO_CONTENT


def _marks(part: _Prompts, sizes: Indices) -> Hashes:
    """uint64 [used], a hash of size, first and last bytes of each file of one of ``sizes``; 0 for the others."""
    marks = np.zeros(len(part.used), np.uint64)
    chosen = np.flatnonzero(np.isin(part.sizes, sizes) & ~part.is_embedded)
    for at, name in zip(chosen.tolist(), part.names(chosen), strict=True):
        marks[at] = _mark(name, int(part.sizes[at]))
    return marks


def _mark(path: str, size: int) -> int:
    try:
        with open(path, "rb", buffering=0) as file:
            digest = blake2b(b"%d:" % size + file.read(_MARKED), digest_size=8)
            if size > _MARKED:
                file.seek(size - _MARKED)
                digest.update(file.read(_MARKED))
    except OSError:
        return 0
    return int.from_bytes(digest.digest(), "big")


def _overlap(evaluation: list[_Prompts], seen_images: Hashes, seen_prompts: set[tuple[int, ...]]) -> Overlap:
    items = with_image = whole = 0
    examples: list[str] = []
    for part in evaluation:
        has_image = part.shows(seen_images)
        is_whole = np.zeros(len(part.positions), np.bool_)
        for at, key in part.keys(np.ones(len(part.positions), np.bool_)).items():
            is_whole[at] = key in seen_prompts
        items += len(part.positions)
        with_image += int(has_image.sum())
        whole += int(is_whole.sum())
        examples += [part.origin(at) for at in np.flatnonzero(has_image | is_whole)[: 3 - len(examples)].tolist()]
    return Overlap(items, with_image, whole, tuple(examples))


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):
        return -1


def _file_digest(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return _digest(file.read())
    except OSError:
        return None


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
