"""What stands in both training and evaluation data: figures on such items measure memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmpo.data.records import IMAGE_PLACEHOLDER


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


def find_overlap(training: Iterable[Item], evaluation: Collection[Item]) -> Overlap:
    """What of one evaluation set training saw too; see :func:`find_overlaps`."""
    return find_overlaps(training, {"": evaluation})[""]


def find_overlaps(training: Iterable[Item], evaluations: Mapping[str, Collection[Item]]) -> dict[str, Overlap]:
    """For each evaluation set by name, what of it training saw too. The training items are read once for all sets,
    the others twice.

    They are compared by content: images by a hash of their bytes, words with case and spaces evened out. Only training
    images of the same size as an evaluation image are read. A file that cannot be read equals none.
    """
    content = _ContentHash()
    sizes = {_size(image) for items in evaluations.values() for item in items for image in item.images}
    training_images: set[str] = set()
    training_prompts: set[str] = set()
    for item in training:
        hashes = [content(image) if _size(image) in sizes else f"other:{image!r:.200}" for image in item.images]
        training_images.update(hashes)
        training_prompts.add(_prompt_key(item, hashes))
    return {name: _overlap(items, training_images, training_prompts, content) for name, items in evaluations.items()}


def _overlap(
    evaluation: Collection[Item], training_images: set[str], training_prompts: set[str], content: _ContentHash
) -> Overlap:
    with_image = whole = 0
    examples: list[str] = []
    for item in evaluation:
        hashes = [content(image) for image in item.images]
        has_image = any(value in training_images for value in hashes)
        is_whole = _prompt_key(item, hashes) in training_prompts
        with_image += has_image
        whole += is_whole
        if (has_image or is_whole) and len(examples) < 3:
            examples.append(item.origin or item.text[:40])
    return Overlap(len(evaluation), with_image, whole, tuple(examples))


def _prompt_key(item: Item, hashes: Sequence[str]) -> str:
    words = " ".join(item.text.replace(IMAGE_PLACEHOLDER, " ").lower().split())
    return hashlib.blake2b("\0".join([words, *hashes]).encode(), digest_size=16).hexdigest()


def _size(image: Any) -> int:
    if isinstance(image, bytes):
        return len(image)
    try:
        return os.path.getsize(image)
    except (OSError, TypeError):
        return -1


class _ContentHash:
    """Hash of an image's bytes, each path read once. PIL images are hashed by their pixels."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, image: Any) -> str:
        if isinstance(image, bytes):
            return _digest(lambda: image)
        if not isinstance(image, str | os.PathLike):
            return _digest(image.tobytes)
        path = os.fspath(image)
        if path not in self._known:
            self._known[path] = _digest(lambda: _read(path)) if os.path.isfile(path) else f"absent:{path}"
        return self._known[path]


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _digest(read: Callable[[], bytes]) -> str:
    return hashlib.blake2b(read(), digest_size=16).hexdigest()
