"""Knows where a chat template puts the texts of a conversation, and finds a text that it leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A message's content: its texts, and None for each image.
Items = tuple[str | None, ...]
Turn = tuple[str, Items]  # role and content

_PROBE = re.compile(r"vlmpo-probe-(\d+)-text")


def with_probes(turns: Sequence[Turn]) -> list[Turn]:
    """Return the conversation with a text of its own, which no template has a reason to change, for each text."""
    number = -1

    def probe(item: str | None) -> str | None:
        nonlocal number
        if item is None:
            return None
        number += 1
        return f"vlmpo-probe-{number}-text"

    return [(role, tuple(map(probe, items))) for role, items in turns]


def texts_of(turns: Sequence[Turn]) -> Iterator[str]:
    """Yield the texts of a conversation, in order."""
    return (item for _, items in turns for item in items if item is not None)


@dataclass(frozen=True)
class PromptShape:
    """Holds how a template renders all conversations of the same roles and kinds of content.

    Attributes:
        literals: what the template writes: before the first text, between texts, after the last one.
        order: which of the conversation's texts stand between them.
        rendered: the rendering it was read from.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]
    rendered: str

    @classmethod
    def of(cls, rendered: str) -> PromptShape:
        """Read the shape from the rendering of a conversation :func:`with_probes`."""
        literals_and_numbers = _PROBE.split(rendered)
        return cls(tuple(literals_and_numbers[::2]), tuple(map(int, literals_and_numbers[1::2])), rendered)

    def fill(self, texts: Sequence[str]) -> str:
        """Return what a conversation of these texts becomes if the template changes none of them."""
        parts = [
            part
            for number, literal in zip(self.order, self.literals, strict=False)
            for part in (literal, texts[number])
        ]
        return "".join([*parts, self.literals[-1]])

    def left_out(self, texts: Sequence[str]) -> int | None:
        """Return the first of the texts, blank ones aside, that has no place; None if all have one."""
        return next((n for n, text in enumerate(texts) if n not in self.order and text.strip()), None)


def find_lost(rendered: str, texts: Sequence[str], order: Sequence[int]) -> int | None:
    """Return the first of the texts that is not in ``rendered`` after those before it in ``order``; None if all are.

    White space at a text's ends may be gone.
    """
    position = 0
    for number in order:
        text = texts[number].strip()
        found = rendered.find(text, position)
        if found < 0:
            return number
        position = found + len(text)
    return None
