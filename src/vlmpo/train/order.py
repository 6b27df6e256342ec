"""The order in which an epoch takes its pairs: a pure function of the seed, the epoch and the data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from vlmpo.errors import RecordError

Item = TypeVar("Item")


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """All indices below ``count``, in an order of their own for each seed and epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def prompt_labels(pairs: Any) -> list[bytes]:
    """For each pair what tells its prompt, images included, from others: 16 bytes. Reads every record once, no image.

    A record that cannot be read has a label of its own.
    """
    return [_label(pairs, index) for index in range(len(pairs))]


def _label(pairs: Any, index: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        pair = pairs[index]
    except RecordError:
        digest.update(f"record {index}".encode())
        return digest.digest()
    for message in pair.prompt:
        digest.update(f"{message.role}\0{message.text}\0".encode("utf-8", "surrogatepass"))
    for kind, medium in (*(("image", one) for one in pair.images), *(("video", one) for one in pair.videos)):
        digest.update(kind.encode())
        if isinstance(medium, str | os.PathLike):
            digest.update(os.fspath(medium).encode())
        else:
            digest.update(medium if isinstance(medium, bytes) else medium.tobytes())
        digest.update(b"\0")
    return digest.digest()


def room_for_groups(most: int, per_device: int) -> str | None:
    """A remark where a micro-batch of ``per_device`` pairs is too small for ``most`` pairs of one prompt; else None."""
    if most <= max(1, per_device):
        return None
    have = "no two pairs" if per_device == 1 else f"only {per_device} pairs"
    return (
        f"data.group_by_prompt is {most}, but {have} of a prompt can share its prompt: a micro-batch holds "
        f"{per_device}; raise training.per_device_train_batch_size (max_tokens_per_row bounds the memory, not it)"
    )


def runs(items: Sequence[Item], most: int, alike: Callable[[Item, Item], bool]) -> list[list[Item]]:
    """``items`` cut into runs of up to ``most`` neighbours that are ``alike`` the first of their run."""
    found: list[list[Item]] = []
    for item in items:
        if found and len(found[-1]) < most and alike(found[-1][0], item):
            found[-1].append(item)
        else:
            found.append([item])
    return found


def with_groups(order: Sequence[int], labels: Sequence[bytes], most: int) -> list[int]:
    """``order`` with pairs of one prompt brought together, up to ``most`` at a time.

    A group stands where its first pair stood. So which pairs meet, and where, is as random as ``order``, and every
    pair still comes once.
    """
    open_groups: dict[bytes, list[int]] = {}
    groups: list[list[int]] = []
    for index in order:
        group = open_groups.get(labels[index])
        if group is None or len(group) == most:
            group = open_groups[labels[index]] = []
            groups.append(group)
        group.append(index)
    return [index for group in groups for index in group]
