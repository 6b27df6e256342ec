"""Tells responses that continue a prompt as they stand from answers that go through the chat template."""

from __future__ import annotations

from typing import NamedTuple

from vlmpo.data.records import PreferencePair

THOUGHT_OPEN, THOUGHT_CLOSE = "<think>", "</think>"


class Reading(NamedTuple):
    """Says how a response is scored.

    Attributes:
        as_sampled: as it stands, right after the prompt; otherwise as the template renders it.
        complete: with the token that ends the turn.
    """

    as_sampled: bool
    complete: bool


def readings(pair: PreferencePair, opens_thought: bool) -> tuple[Reading, Reading]:
    """Return how the chosen and the rejected response of ``pair`` are scored.

    A record may say both. If it says nothing and the prompt opens a thought, a response that closes a thought without
    opening one is what the model wrote after the prompt, and so is the other response of its pair, unless it opens a
    thought itself. One that never closes the thought was then cut off in it.

    Args:
        pair: the pair; its rejected response may be None.
        opens_thought: whether the template's generation prompt ends within a thought.
    """
    texts = (pair.chosen, pair.rejected or "")
    continued = opens_thought and any(map(closes_unopened, texts))

    def reading(text: str, complete: bool | None) -> Reading:
        if pair.as_sampled:
            return Reading(True, complete is not False)
        as_sampled = continued and not text.lstrip().startswith(THOUGHT_OPEN)
        if complete is None and as_sampled:
            complete = THOUGHT_CLOSE in text
        return Reading(as_sampled, complete is not False)

    return reading(texts[0], pair.chosen_complete), reading(texts[1], pair.rejected_complete)


def closes_unopened(text: str) -> bool:
    """Return whether ``text`` closes a thought that it did not open: it begins within one."""
    before, closed, _ = text.partition(THOUGHT_CLOSE)
    return bool(closed) and THOUGHT_OPEN not in before


def ends_in_thought(text: str) -> bool:
    """Return whether a thought that ``text`` opens is not closed in it."""
    return text.rfind(THOUGHT_OPEN) > text.rfind(THOUGHT_CLOSE)
