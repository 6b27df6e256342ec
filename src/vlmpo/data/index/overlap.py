"""Find evaluation items that are in the training data too: figures on them measure memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.dataset import PairDataset
from vlmpo.data.index.record_index import (
    Hashes,
    Medium,
    RecordIndex,
    Row,
    index_batch,
    index_table,
    words_hash,
)
from vlmpo.hashing import content_hash

_UNKNOWN = 0  # in place of a hash: the file cannot be read, or nothing on the other side can equal it
_ABSENT = -1  # in place of a size
_END = 4096  # bytes


class Item(NamedTuple):
    """A prompt: its words, its images (paths, bytes or PIL images), and where it was read."""

    text: str
    images: tuple[Any, ...]
    origin: str


@dataclass(frozen=True)
class Overlap:
    """Counts evaluation items that training saw too.

    Attributes:
        items: evaluation items in all.
        with_seen_image: of these, items with an image whose content is also a training image.
        seen_whole: of these, items whose words and images together (words alone, if there are no images) are also a
            training prompt.
        examples: origins of the first few such items.
    """

    items: int
    with_seen_image: int
    seen_whole: int
    examples: tuple[str, ...]

    def message(self, name: str) -> str | None:
        """Return one line for the user, or None if nothing is shared."""
        if not self.with_seen_image and not self.seen_whole:
            return None
        return (
            f"{name}: of {self.items} items, {self.with_seen_image} show an image that training shows too, and "
            f"{self.seen_whole} are whole prompts of the training data (e.g. {', '.join(self.examples)}); figures on "
            "them measure memory"
        )


def find_overlaps(
    training: PairDataset | Iterable[Item], evaluations: Mapping[str, PairDataset | Iterable[Item]]
) -> dict[str, Overlap]:
    """Count for each evaluation set, by name, what training saw too.

    Images are compared by a hash of their bytes, words by a hash that ignores case and spaces (64 bits both). Of a
    training image only the size is looked up, unless an evaluation image has the same; then its first and last 4 KiB
    are read, and the whole file only if these are the same too. A file that cannot be read equals none.
    """
    trained = _read_prompts(training)
    evaluated = {name: _read_prompts(items) for name, items in evaluations.items()}
    all_evaluated = [prompts for parts in evaluated.values() for prompts in parts]
    _hash_images(trained, all_evaluated)
    seen_images = _joined([prompts.hashes for prompts in trained])
    seen_images = seen_images[seen_images != _UNKNOWN]
    words = _joined([prompts.index.words for prompts in all_evaluated])
    seen_prompts = {key for prompts in trained for key in prompts.keys(words).values()}
    return {name: _count(parts, seen_images, seen_prompts) for name, parts in evaluated.items()}


class _Prompts:
    """Holds the prompts of one source, a row of ``index`` each.

    Attributes:
        index: prompts and their images and videos.
        origin: returns where the prompt of a row was read.
        sizes: int64 [media], bytes of each that a row shows; _ABSENT if there is no such file.
        is_embedded: bool [media].
        ends: uint64 [media], hash of a file's size, first and last bytes, if its size is also on the other side.
        hashes: uint64 [media], hash of the content, if its like may be on the other side.
    """

    def __init__(self, index: RecordIndex, origin: Callable[[int], str]) -> None:
        self.index = index
        self.origin = origin
        self.sizes = np.full(index.media_count, _ABSENT, np.int64)
        self.is_embedded = np.zeros(index.media_count, np.bool_)
        self.ends = np.full(index.media_count, _UNKNOWN, np.uint64)
        self.hashes = np.full(index.media_count, _UNKNOWN, np.uint64)
        for number, medium in index.shown_media():
            self.is_embedded[number] = medium.is_embedded
            self.sizes[number] = medium.size if medium.is_embedded else _size_of(medium.name)

    def keys(self, words: Hashes) -> dict[int, tuple[int, ...]]:
        """Return a key for the whole prompt, by row, for rows with one of ``words`` and all images hashed."""
        index = self.index
        rows = np.flatnonzero(np.isin(index.words, words) & ~index.shows_any(self.hashes == _UNKNOWN))
        return {row: (int(index.words[row]), *self.hashes[index.shown(row)].tolist()) for row in rows.tolist()}


def _read_prompts(items: PairDataset | Iterable[Item]) -> list[_Prompts]:
    if isinstance(items, PairDataset):
        return [_Prompts(source.index, items.select(source.pairs).origin) for source in items.scan()]
    rows: list[Row] = []
    origins: list[str] = []
    for item in items:
        media = [Medium.of(image) for image in item.images]
        rows.append(Row(len(rows), words_hash(item.text), prompt=0, media=media))
        origins.append(item.origin or item.text[:40])
    return [_Prompts(RecordIndex(index_table([index_batch(rows)])), origins.__getitem__)]


def _hash_images(training: Sequence[_Prompts], evaluation: Sequence[_Prompts]) -> None:
    """Set ``hashes`` of all images that may have their like on the other side."""
    sizes = _shared([prompts.sizes for prompts in training], [prompts.sizes for prompts in evaluation], _ABSENT)
    for prompts in (*training, *evaluation):
        files = np.flatnonzero(np.isin(prompts.sizes, sizes) & ~prompts.is_embedded)
        for number, medium in prompts.index.describe(files):
            prompts.ends[number] = _ends_hash(medium.name, int(prompts.sizes[number]))
    ends = _shared([prompts.ends for prompts in training], [prompts.ends for prompts in evaluation], _UNKNOWN)
    for side, other_side in ((training, evaluation), (evaluation, training)):
        embedded_sizes = _joined([prompts.sizes[prompts.is_embedded] for prompts in other_side])
        for prompts in side:
            may_equal_a_file = np.isin(prompts.ends, ends) | np.isin(prompts.sizes, embedded_sizes)
            chosen = np.isin(prompts.sizes, sizes) & (prompts.is_embedded | may_equal_a_file)
            for number, medium in prompts.index.describe(np.flatnonzero(chosen)):
                digest = medium.name if medium.is_embedded else _file_hash(medium.name)
                prompts.hashes[number] = int(digest[:16], 16) or 1 if digest else _UNKNOWN


def _count(evaluation: Sequence[_Prompts], seen_images: Hashes, seen_prompts: set[tuple[int, ...]]) -> Overlap:
    items = with_seen_image = seen_whole = 0
    examples: list[str] = []
    for prompts in evaluation:
        index = prompts.index
        shows_seen = index.shows_any(np.isin(prompts.hashes, seen_images))
        is_seen = np.zeros(len(index), np.bool_)
        is_seen[[row for row, key in prompts.keys(index.words).items() if key in seen_prompts]] = True
        items += len(index)
        with_seen_image += int(shows_seen.sum())
        seen_whole += int(is_seen.sum())
        examples += map(prompts.origin, np.flatnonzero(shows_seen | is_seen)[: 3 - len(examples)].tolist())
    return Overlap(items, with_seen_image, seen_whole, tuple(examples))


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


def _shared(arrays: Sequence[NDArray[Any]], other_arrays: Sequence[NDArray[Any]], nothing: int) -> NDArray[Any]:
    values = np.intersect1d(_joined(arrays), _joined(other_arrays))
    return values[values != nothing]


def _size_of(path: str) -> int:
    try:
        return os.path.getsize(path) if os.path.isfile(path) else _ABSENT  # a pipe is never read
    except (OSError, ValueError):
        return _ABSENT


def _ends_hash(path: str, size: int) -> int:
    try:
        with open(path, "rb", buffering=0) as file:
            ends = file.read(_END)
            if size > _END:
                file.seek(size - _END)
                ends += file.read(_END)
    except OSError:
        return _UNKNOWN
    return int(content_hash(f"{size}:", ends, size=8), 16)


def _file_hash(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return content_hash(file.read())
    except OSError:
        return None
