"""Tells whether two texts mean one thing in two forms: languages, dates, plurals, abbreviations."""

from __future__ import annotations

import re

from vlmpo.verifiers.languages import words
from vlmpo.verifiers.numbers import NUMBER_WORDS
from vlmpo.verifiers.texts import NO, YES, plain_text, words_of, yes_or_no_of
from vlmpo.verifiers.vocabulary import COLOURS, HOMOGRAPHS, NUMBERS

_LITTLE = re.compile(rf"to|at|in|on|of|from|by|the|under|it|with|for|{words('article')}")
_HOUR = re.compile(r"(\d{1,2})(?::00)?\s*(?P<noted>a\.?m\.?|p\.?m\.?|o'?clock)?")
_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july", "august", "september", "october"),
    *("november", "december"),
)


def same_meaning(answer: str, truth: str) -> bool | None:
    """Compare yes and no, numbers and colours across languages; None if one of them is no such word."""
    one, other = plain_text(answer), plain_text(truth)
    one = yes_or_no_of(one) or one
    meanings = []
    for text in (one, other):
        yes, no = YES.fullmatch(text), NO.fullmatch(text)
        number = NUMBERS.get(
            text, NUMBER_WORDS.get(text, int(text) if text.isascii() and text.isdigit() and len(text) < 5 else None)
        )
        colour = COLOURS.get(re.sub("的$", "", text))
        meanings.append(_meanings(yes, no, number, colour))
    if not meanings[0] or not meanings[1]:
        return None
    kinds = [{kind for kind, _ in meaning} for meaning in meanings]
    if meanings[0] & meanings[1]:
        return True
    return False if kinds[0] & kinds[1] else None


def _meanings(yes: object, no: object, number: int | None, colour: int | None) -> set[tuple[str, int]]:
    found = {("answer", 1)} if yes else set()
    found |= {("answer", 0)} if no else set()
    found |= {("number", number)} if number is not None else set()
    return found | ({("colour", colour)} if colour is not None else set())


def is_homograph(answer: str, truth: str) -> bool:
    """Return whether one of two words may be English, and mean something else than the other: "rose" and "pink"."""
    return plain_text(truth) in HOMOGRAPHS or plain_text(answer) in HOMOGRAPHS - NUMBERS.keys()


def read_date(text: str) -> tuple[int, int, int] | None:
    """Return year, month and day of ``March 5, 2019``, ``5 March 2019``, ``2019-03-05`` or ``2019年3月5日``."""
    text = plain_text(text)
    if numbers := re.fullmatch(r"(\d{4})(?:-|/|年)(\d{1,2})(?:-|/|月)(\d{1,2})日?", text):
        return int(numbers[1]), int(numbers[2]), int(numbers[3])
    words_in = re.fullmatch(
        r"(?:(\d{1,2})(?:st|nd|rd|th)? )?([a-z]{3,9})\.?(?: (\d{1,2})(?:st|nd|rd|th)?)?,? (\d{4})", text
    )
    if not words_in or not (words_in[1] or words_in[3]):
        return None
    month = next((i for i, name in enumerate(_MONTHS, start=1) if name.startswith(words_in[2])), None)
    return None if month is None else (int(words_in[4]), month, int(words_in[1] or words_in[3]))


def may_be_same(answer: str, truth: str) -> bool:
    """Return whether two texts may be one thing: words in another order, a plural, a time, an abbreviation."""
    ones, others = words_of(answer), words_of(truth)
    if (len(ones) > 1 and sorted(ones) == sorted(others)) or _differ_in_little(ones, others):
        return True
    hours = [_HOUR.fullmatch(plain_text(text)) for text in (answer, truth)]
    if hours[0] and hours[1] and hours[0][1] == hours[1][1] and (hours[0]["noted"] or hours[1]["noted"]):
        return True
    figures = [re.findall(r"\d+", text) for text in (answer, truth)]
    years = [{figure for figure in found if len(figure) == 4} for found in figures]
    if (len(figures[0]) > 1 and figures[0] == figures[1]) or years[0] & years[1]:
        return True
    return ("." in answer + truth or answer.isupper() or truth.isupper()) and _are_abbreviated(answer, truth)


def _differ_in_little(ones: list[str], others: list[str]) -> bool:
    """Return whether two lists of words differ in plurals, or in prepositions and articles: "to the right"."""
    if [word.rstrip("s") for word in ones] == [word.rstrip("s") for word in others]:
        return True
    shorter, longer = sorted((ones, others), key=len)
    extra = [word for word in longer if word not in shorter]
    is_little = all(len(word) > 1 and _LITTLE.fullmatch(word) for word in extra)
    return bool(extra) and is_little and [word for word in longer if word in shorter] == shorter != []


def _are_abbreviated(answer: str, truth: str) -> bool:
    for short, long in ((answer, truth), (truth, answer)):
        initials = "".join(word[0] for word in re.findall(r"\w+", long) if word[0].isupper())
        if len(initials) > 1 and re.sub(r"[\W_]", "", short).upper() == initials:
            return True
    parts = [re.findall(r"\w+", text.lower()) for text in (answer, truth)]
    return len(parts[0]) == len(parts[1]) > 1 and all(map(_may_abbreviate, *parts))


def _may_abbreviate(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    letters = iter(long)
    return one == other or (short[0] == long[0] and len(short) <= 4 and all(letter in letters for letter in short))
