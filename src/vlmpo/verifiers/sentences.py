"""Cuts text into sentences, and tells whether a text is one, in the languages that are read."""

from __future__ import annotations

import re

from vlmpo.verifiers.characters import same_length
from vlmpo.verifiers.languages import EAST_ASIAN, LETTERS, word_set, words

EMPHASIS = "*_`#"
# A full stop after these does not end a sentence, nor one after a single letter ("C. The red one", "John F. K.").
_TITLES = word_set("dr mr mrs ms st prof no vs jr sr approx ca fig inc co nr z.b d.h bzw sra mme ул г см")
_STOP = re.compile(rf"[.!?](?=\s+[\"'(¿¡]*[A-ZÀ-ÖØ-ÞА-ЯЁ{EAST_ASIAN}])|[。！？](?=\S)")
_SENTENCE = re.compile(words("sentence"), re.IGNORECASE)
_MOST_WORDS, _MOST_SIGNS = 12, 12  # of what is no sentence; signs are Chinese and Japanese
_COPULA = re.compile(rf"{words('copula')}\s*:?\s*(?P<rest>.+)", re.IGNORECASE)
_VERB = re.compile(rf"{words('be')}|\s-\s", re.IGNORECASE)
_NOT_PLAIN = re.compile(
    rf"{words('denial', 'supposed')}|(?<![{LETTERS}])(?:none?|that|which|who|que|ne)(?![{LETTERS}])|n't|n'"
    "|[不没非如若]|ない|でも",
    re.IGNORECASE,
)
_ENDING = re.compile(rf"(?<=\S)\s*(?:{words('ending')})(?:[。.!]?\s*)$")
_DENIED_END = re.compile("(?:では|じゃ|で)(?:ありません|ない|なく)")


def tidy(text: str) -> str:
    """Strip white space, emphasis, ``$...$`` and a full stop around ``text``, unless nothing else is left."""
    whole = text.strip()
    text = _without_emphasis(whole)
    text = _without_emphasis(re.sub(r"(?<![.。])[.。．](?=[*_`]*$)", "", text))
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner.strip() and opening not in inner:
            text = inner.strip()
    return text or whole


_EMPHASIS = 200  # characters at the end of a text in which signs of emphasis are looked for


def _without_emphasis(text: str) -> str:
    """Strip emphasis before and after; a single sign after ``A*`` or ``C#`` is none unless one is before."""
    opening = re.match(r"[*_`#\s]*", text)
    text = text[opening.end() if opening else 0 :].rstrip()
    is_paired = opening is not None and opening.group().strip() != ""
    # Possessive: ** may also be * and *, in more ways than can be tried.
    pattern = r"[*_`#\s]+$" if is_paired else r"(?:\*\*|__|`|(?<=\W)[*_#]|\s)++$"
    return text[:-_EMPHASIS] + re.sub(pattern, "", text[-_EMPHASIS:])


def first_sentence(text: str) -> str:
    """Return ``text`` up to the first end of a sentence: ``。``, or a full stop, ``!`` or ``?`` before a capital."""
    for stop in _STOP.finditer(text):
        before = re.search(r"([\w.]+)\W*$", text[max(0, stop.start() - 40) : stop.start()])
        word = before.group(1).lower() if before and stop.group() == "." else ""
        if not (word in _TITLES or (len(word) == 1 and word.isalpha())):
            return text[: stop.start()]
    return text


def is_sentence(text: str) -> bool:
    """Return whether ``text`` has words of a sentence, or more of them than a short answer."""
    shape = same_length(text).replace("’", "'")
    if len(shape.split()) > _MOST_WORDS or len(re.findall(f"[{EAST_ASIAN}]", shape)) > _MOST_SIGNS:
        return True
    return _SENTENCE.search(shape) is not None


def said_of_subject(text: str) -> str | None:
    """Return what a plain sentence says of its subject, ``red`` of "The car is red."; None if it is none."""
    shape = same_length(text)
    copula = _COPULA.fullmatch(shape)
    if copula is None:
        return None
    start = copula.start("rest")
    subject, rest = shape[:start], without_ending(shape[start:])
    if len(_VERB.findall(subject)) != 1 or _NOT_PLAIN.search(subject) or is_denied_after(rest):
        return None
    return text[start : start + len(rest)]


def without_ending(text: str) -> str:
    """Return ``3`` of ``3です。``: an answer in inverted word order without what ends its sentence."""
    return _ENDING.sub("", text.strip())


def is_denied_after(text: str) -> bool:
    """Return whether a denial follows what is denied, as in ``3ではありません``; alone it denies nothing."""
    found = _DENIED_END.search(text)
    return found is not None and found.start() > 0
