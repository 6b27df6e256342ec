"""Every model family vlmpo is held to: a tiny model from its own config class, with its real processor.

A group module (``internvl``, ``qwen``, ...) lists its ``FAMILIES``; they are gathered here by name. Whoever
adds a family adds it to its group: all tests and the table in the docs go through this list.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.tiny_models import random_pair
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.records import PreferencePair


@dataclass(frozen=True)
class Family:
    """One family as the tests build it.

    Attributes:
        name: short and unique, also the test's id: ``internvl-qwen2``.
        processor: builds the real processor (a plain tokenizer for text-only models), with a chat template. Cached:
            nobody may change what it returns.
        model: builds the tiny model from a seed: float32, eval, on the CPU, a new object each call.
        shared: whether its rows share prompts; False: each response is read in a row of its own.
        note: what the table in the docs says beside it, the reason where ``shared`` is False.
        images: the most images the tests put into one prompt: 0 for text-only models.
    """

    name: str
    processor: Callable[[], Any]
    model: Callable[[int], Any]
    shared: bool
    note: str = ""
    images: int = 2


GROUPS = ("internvl", "qwen", "llava", "idefics", "pixtral", "gemma", "text")


def _gather() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for group in GROUPS:
        for family in importlib.import_module(f"tests.zoo.{group}").FAMILIES:
            assert family.name not in found, family.name
            found[family.name] = family
    return found


def sample_pairs(family: Family) -> dict[str, PreferencePair]:
    """The layouts a family is tested on, by name: one image, two images, text only; as far as it takes images."""
    kinds = {"one image": 1, "two images": 2, "text only": 0}
    wanted = {name: count for name, count in kinds.items() if count <= family.images}
    return {name: random_pair(seed, images=count) for seed, (name, count) in enumerate(wanted.items(), start=1)}


@functools.cache
def encoded_pairs(name: str) -> dict[str, EncodedPair]:
    """``sample_pairs`` of the family ``name`` through the real PairEncoder."""
    family = FAMILIES[name]
    encoder = PairEncoder(family.processor())
    return {kind: encoder.encode(pair) for kind, pair in sample_pairs(family).items()}


FAMILIES = _gather()
