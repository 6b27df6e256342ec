"""Knows where a chat template puts the texts of a conversation, and finds a text that it leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# A message's content: its texts, and None for each image.
Items = tuple[str | None, ...]
Turn = tuple[str, Items]  # role and content

# White space around a probe shows whether the template trims; it differs at the two ends, as probes may be neighbours.
_BEFORE, _AFTER = " \n\t", "\t\n "
_PROBE = re.compile(rf"({_BEFORE})?vlmpo-probe-(\d+)-text({_AFTER})?")


def with_probes(turns: Sequence[Turn]) -> list[Turn]:
    """Return the conversation with a text of its own, which no template has a reason to change, for each text."""
    number = -1

    def probe(item: str | None) -> str | None:
        nonlocal number
        if item is None:
            return None
        number += 1
        return f"{_BEFORE}vlmpo-probe-{number}-text{_AFTER}"

    return [(role, tuple(map(probe, items))) for role, items in turns]


def texts_of(turns: Sequence[Turn]) -> Iterator[str]:
    """Yield the texts of a conversation, in order."""
    return (item for _, items in turns for item in items if item is not None)


class Place(NamedTuple):
    """Says which text of the conversation stands here, and whether with the white space at its start and end."""

    text: int
    keeps_start: bool
    keeps_end: bool


@dataclass(frozen=True)
class PromptShape:
    """Holds how a template renders all conversations of the same roles and kinds of content.

    Attributes:
        literals: what the template writes: before the first text, between texts, after the last one.
        places: the texts between them.
        rendered: the rendering it was read from.
    """

    literals: tuple[str, ...]
    places: tuple[Place, ...]
    rendered: str

    @classmethod
    def of(cls, rendered: str) -> PromptShape:
        """Read the shape from the rendering of a conversation :func:`with_probes`."""
        found = list(_PROBE.finditer(rendered))
        places = tuple(Place(int(probe[2]), probe[1] is not None, probe[3] is not None) for probe in found)
        ends = [0, *(probe.end() for probe in found)]
        starts = [*(probe.start() for probe in found), len(rendered)]
        return cls(tuple(rendered[a:b] for a, b in zip(ends, starts, strict=True)), places, rendered)

    def fill(self, texts: Sequence[str]) -> str:
        """Return what a conversation of these texts becomes if the template does nothing else to them than trim."""
        parts = [self.literals[0]]
        for place, literal in zip(self.places, self.literals[1:], strict=True):
            text = texts[place.text] if place.keeps_start else texts[place.text].lstrip()
            parts += [text if place.keeps_end else text.rstrip(), literal]
        return "".join(parts)

    def left_out(self, texts: Sequence[str]) -> int | None:
        """Return the first of the texts, blank ones aside, that has no place; None if all have one."""
        shown = {place.text for place in self.places}
        return next((n for n, text in enumerate(texts) if n not in shown and text.strip()), None)


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
