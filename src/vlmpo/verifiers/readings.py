"""Shortens an answer to what it says: without explanation, contrast and remarks in brackets."""

from __future__ import annotations

import re

from vlmpo.verifiers.characters import same_length
from vlmpo.verifiers.doubt import is_alternative, is_taken_back
from vlmpo.verifiers.languages import EAST_ASIAN, words
from vlmpo.verifiers.numbers import read_quantity
from vlmpo.verifiers.sentences import first_sentence, tidy

_CONTRAST = re.compile(
    rf"(?:\s*[,;(，（]\s*(?:(?:and|{words('but')})\s)?{words('contrast')}"
    r"|\s+(?:and not|but not|rather than|instead of|und nicht)\b).*",
    re.IGNORECASE | re.DOTALL,
)
_CLAUSE = r"which|where|so|it|they|there|he|she|we|i\.e\.|namely|meaning|making|ce qui|lo que|o que|was|что"
_REASON = re.compile(
    rf"\s*[,;:—–-]?\s*{words('reason')}.*|\s*[,;—–]\s+(?:{_CLAUSE})\b.*"
    rf"|\s+[—–-]\s+(?:the|an?|it|this|that|{_CLAUSE})\b.*",
    re.IGNORECASE | re.DOTALL,
)
# Words in brackets at the end.
_ASIDE = re.compile(rf"\s*\(([^()]*[^\W\d_]{{3,}}[^()]*|[^()]*[{EAST_ASIAN}]{{2,}}[^()]*)\)[.。]?$")


def readings_of(text: str) -> list[str]:
    """Return the answer without what only explains it, or says what it is not; then ever more of it."""
    readings = [text]
    for shorten in (_first_of_line, _without_contrast, _without_reason, _without_aside):
        shorter = shorten(readings[0]).strip()
        if shorter and shorter != readings[0]:
            readings.insert(0, tidy(shorter))
    return readings


def _first_of_line(text: str) -> str:
    first = first_sentence(text)
    return first if first == text or not is_taken_back(text[len(first) :], first) else text


def _without_contrast(text: str) -> str:
    contrast = _CONTRAST.search(same_length(text))
    return text[: contrast.start()] if contrast and contrast.start() else text


def _without_reason(text: str) -> str:
    reason = _REASON.search(same_length(text))
    return text[: reason.start()] if reason and reason.start() else text


def _without_aside(text: str) -> str:
    aside = _ASIDE.search(same_length(text))
    if not aside or is_alternative(f"x {aside[1]}") or (len(aside[1].split()) < 2 and aside[1].isascii()):
        return text
    rest, numbers = text[: aside.start()], set(re.findall(r"\d+", aside[1]))
    is_other = len(numbers) == 1 and not numbers & set(re.findall(r"\d+", rest))
    return text if is_other or read_quantity(rest) else rest  # a number is read together with its aside
