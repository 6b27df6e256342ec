"""Measures how alike two texts are, as ANLS does: a misread letter is forgiven, another number or word is not."""

from __future__ import annotations

import re

from vlmpo.verifiers.languages import word_set
from vlmpo.verifiers.texts import DENIAL, plain_text
from vlmpo.verifiers.vocabulary import COLOURS

# Words so alike that one is taken for a misreading of the other, and so unlike in what they say.
_UNLIKE = [
    word_set(group)
    for group in (
        "january february march april may june july august september october november december",
        "monday tuesday wednesday thursday friday saturday sunday",
        "north south east west northeast northwest southeast southwest northern southern eastern western",
        "increase decrease increases decreases increased decreased increasing decreasing",
        "one two three four five six seven eight nine ten eleven twelve",
        *("left right", "top bottom", "true false", "yes no", "male female", "man woman", "men women", "more less"),
        *("up down", "first last", "before after", "above below", "higher lower", "highest lowest", "maximum minimum"),
        *("max min", "open closed", "inside outside", "import export imports exports", "internal external", "hot cold"),
        *("buy sell", "front back", "he she", "black blue brown", "red green grey gray", "cat car bat hat rat"),
        *("horse house mouse", "boat goat coat", "king ring", "cosine sine", "accept except", "odd even", "dog fog"),
    )
]
_LEAST = 0.5  # below it nobody asks how alike two texts are
_OPPOSITE = ("un", "in", "im", "il", "ir", "dis", "non", "non-", "a", "fe", "anti", "de", "mis", "sub", "super", "re")
_OPPOSITE_PARTS = (("^hyper", "hypo"), ("^endo", "exo"), ("(?:er|or)$", "ee"))


def likeness_of(answer: str, truth: str) -> float:
    """Return how alike two texts are, from 0 to 1; of lists and texts of as many words, their most unlike parts."""
    one, other = plain_text(answer), plain_text(truth)
    for separator in (r"\s*[,;]\s*", r"\s+"):
        ones, others = re.split(separator, one), re.split(separator, other)
        if len(ones) != len(others) and "," in separator:
            return 0
        if len(ones) > 1 and len(ones) == len(others):
            return min(map(likeness_of, ones, others))
    numbers = [re.findall(r"\d+|[\^√/*=<>±!+]", text) for text in (one, other)]
    denials = [DENIAL.search(text) is None for text in (one, other)]
    if numbers[0] != numbers[1] or denials[0] != denials[1] or _are_unlike(one, other):
        return 0
    longer = max(len(one), len(other))
    if abs(len(one) - len(other)) > (1 - _LEAST) * longer:  # the distance is at least that; spares long texts
        return 0
    return 1 - _levenshtein(one, other) / longer


def _are_unlike(one: str, other: str) -> bool:
    """Return whether the words in which two texts differ are others of one kind, or opposites."""
    ones, others = set(re.findall(r"\w+", one)), set(re.findall(r"\w+", other))
    for a in ones - others:
        for b in others - ones:
            if (
                len(a) == len(b) == 1
                or any({a, b} <= group for group in _UNLIKE)
                or any(a == p + b or b == p + a for p in _OPPOSITE)
                or any(re.sub(p, q, a) == b or re.sub(p, q, b) == a for p, q in _OPPOSITE_PARTS)
            ):
                return True
    return COLOURS.get(one, -1) != COLOURS.get(other, -1) and one in COLOURS and other in COLOURS


def _levenshtein(one: str, other: str) -> int:
    """Return how many characters must be inserted, deleted or replaced to turn one text into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
