"""Decides whether the final answer of a response is the true one.

The verdict is ``unparsed``, neither right nor wrong, if no final answer of the verifier's kind can be read: none is
stated, a sentence is given instead of a letter, or two numbers instead of one. Nothing is guessed.
"""

from __future__ import annotations

import logging
import re
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

from vlmpo.data.records import Verdict
from vlmpo.errors import RecipeError, RecordError
from vlmpo.verifiers.answer import first_sentence, parse_final_answer, tidy, unwrap_latex, word_set
from vlmpo.verifiers.numbers import NUMBER_WORDS, Quantity, read_quantity

TOLERANCE = Fraction(5, 100)
ANLS_THRESHOLD = 0.5
_MATH_SECONDS = 5

T = TypeVar("T")


def verify(response: str, truth: str, verifier: str = "auto") -> Verdict:
    """Compare the final answer of ``response`` with ``truth``.

    Args:
        response: a whole response; :func:`vlmpo.verifiers.answer.parse_final_answer` reads its final answer.
        truth: the right answer, on one line.
        verifier: when the two agree.
            ``exact``: the same text, apart from case, white space and a full stop.
            ``option``: the same letter, ``e``, ``(e)`` or ``e) 46670``; the option's text if the truth has it; the same
            letters, if the truth is a list such as ``b, c``.
            ``number``: within 5 % of the truth, as charts are read; exactly, if the truth is 0 or a year, that is plain
            digits from 1800 to 2100.
            ``anls``: normalised Levenshtein similarity, ``1 - distance / longer length``, at least 0.5; digits and
            denials must agree.
            ``vqa``: the same words apart from articles, punctuation and case; number words are digits.
            ``math``: mathematically equal; numbers exactly, everything else by math-verify.
            ``auto``: by the form of the truth: ``option`` for a letter, ``math`` for whole numbers, fractions and
            LaTeX, ``number`` for decimals and percentages, otherwise ``vqa``.

    Returns:
        The verdict: ``status`` is ``correct``, ``wrong`` or ``unparsed``; ``parsed`` the final answer as read, None if
        unparsed; ``verifier`` the one that decided, never ``auto``.

    Raises:
        RecipeError: the verifier is not known.
        RecordError: ``truth_unreadable``: the truth is empty or not of the verifier's kind.
    """
    name = choose_verifier(truth, verifier)
    parsed = parse_final_answer(response)
    agrees = None if parsed is None else _VERIFIERS[name].judge(_readings(parsed), truth)
    if agrees is None:
        return Verdict("unparsed", None, name)
    return Verdict("correct" if agrees else "wrong", parsed, name)


def choose_verifier(truth: str, verifier: str = "auto") -> str:
    """Return the verifier that decides: ``verifier``, or what the truth's form calls for. Raise as :func:`verify`."""
    if verifier not in VERIFIERS:
        raise RecipeError(f"verifier {verifier!r} is not known; use one of {', '.join(VERIFIERS)}")
    if not truth.strip():
        raise RecordError("truth_unreadable", "", "the answer is empty: responses cannot be compared with it")
    name = _by_form(truth) if verifier == "auto" else verifier
    chosen = _VERIFIERS[name]
    if not chosen.reads_truth(truth):
        detail = (
            f"verifier {name}: the answer {truth!r:.80} is not {chosen.kind}; set another verifier for this question"
        )
        raise RecordError("truth_unreadable", "", detail)
    return name


def _by_form(truth: str) -> str:
    text = tidy(truth)
    if re.fullmatch(r"\(?[A-Za-z]\)?|\([A-Za-z]\)\s.+|[A-Za-z]\)\s.+", text) or _letters(text):
        return "option"
    if re.search(r"[\\^√π]|^[\s\d.+-]+/[\s\d.]+$", text):
        return "math"
    quantity = read_quantity(text)
    if quantity is None or re.search(r"[A-Za-z]{3,}\s+[A-Za-z]{3,}|^[A-Za-z]", text):
        return "vqa"
    is_exact = quantity.is_whole and not quantity.percent and not re.search(r"\.\d", text)
    return "math" if is_exact else "number"


# --- readings ---------------------------------------------------------------------------------------------------------

# Decide whether one of the readings of a final answer agrees with the truth; None: the answer cannot be read.
Judge = Callable[[Sequence[str], str], bool | None]

_CONTRAST = re.compile(r"\s*[,;(]\s*(?:and |but )?(?:not|rather than|instead of|as opposed to)\b.*", re.IGNORECASE)
_RETRACTED = re.compile(r"\d|\b(?:wait|no|not|actually|sorry|but|however|or|correction)\b|n't", re.IGNORECASE)


def _readings(parsed: str) -> list[str]:
    """Return the answer as it is; then without ", not ..." after it; then without later sentences that add nothing."""
    readings = [parsed]
    if (shorter := _CONTRAST.sub("", parsed)) not in ("", parsed):
        readings.append(shorter)
    first = first_sentence(parsed)
    if first != parsed and not _RETRACTED.search(parsed[len(first) :]):
        readings.append(first)
    return readings


def _first(read: Callable[[str], T | None], readings: Sequence[str]) -> T | None:
    """Return what ``read`` makes of the first reading it can read."""
    return next((value for reading in readings if (value := read(reading)) is not None), None)


def _text_judge(same: Callable[[str, str], bool]) -> Judge:
    return lambda readings, truth: any(same(reading, truth) for reading in readings)


# --- exact, vqa, anls -------------------------------------------------------------------------------------------------

# Numbers with their sign, points and slashes; words; and the signs that tell "5 %" from "5", "A-" from "A".
_TOKEN = re.compile(r"(?:(?<![\w)])[-+])?(?:\d+(?:[.,:/-]\d+)*|\.\d+)|\w+|[%$€£°+#&=<>≤≥^*@]|(?<=\w)-(?!\w)")
# Only before a word, and `a` not before a single letter: "vitamin A" and "a, b" contain no article.
_ARTICLE = re.compile(r"\b(?:(?:an|the)\s+(?=\w)|a\s+(?=\w\w|\d))")
_COPULA = re.compile(r"(?:it|this|that|they|the(?:\s+[\w-]+){1,6})\s+(?:is|are|was|were)\s+(?P<rest>.+)", re.IGNORECASE)
_DENIAL = re.compile(r"\b(?:not|no|never|none|without|cannot)\b|n't", re.IGNORECASE)


def _plain(text: str) -> str:
    """Even out case, white space, quotes around the text and punctuation at its end, unless nothing else is left."""
    whole = " ".join(unicodedata.normalize("NFKC", tidy(text)).casefold().split())
    text = whole.rstrip(".,;:!? ").strip("\"'“”‘’ ")
    return text or whole


def _same_text(answer: str, truth: str) -> bool:
    return _plain(answer) == _plain(truth)


def words_of(text: str) -> list[str]:
    """Return the words of ``text`` as VQA scoring compares them: no articles or punctuation, number words as digits.

    Signs, points and slashes inside numbers stay; separators of thousands go.
    """
    text = unwrap_latex(_plain(text)).replace("’", "").replace("'", "")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", re.sub("[−–—]", "-", text))
    text = _ARTICLE.sub("", text)
    words = _TOKEN.findall(re.sub(r"(?<=[^\W\d])\.(?=[^\W\d]|\s|$)", "", text))  # U.S.A.
    return [str(NUMBER_WORDS.get(word, word)) for word in words]


def _same_words(answer: str, truth: str) -> bool:
    """Compare as VQA scoring does; "it is red" is read as red, and "yes, it does" as yes."""
    if _same_text(answer, truth):
        return True
    right = words_of(truth)
    if not right:
        return False
    plain = _plain(answer)
    statement = _COPULA.fullmatch(plain)
    if words_of(answer) == right or (statement is not None and words_of(statement["rest"]) == right):
        return True
    head = re.match(r"(yes|no)\s*[,;.:!-]\s*(.*)", plain)
    return head is not None and right == [head[1]] and not {"yes", "no", "not"} & set(words_of(head[2]))


def _similar(answer: str, truth: str) -> bool:
    """Apply ANLS at its threshold. A misread letter is forgiven; other digits, or a denial on one side, are not."""
    one, other = _plain(answer), _plain(truth)
    if re.sub(r"\D", "", one) != re.sub(r"\D", "", other) or bool(_DENIAL.search(one)) != bool(_DENIAL.search(other)):
        return False
    longer = max(len(one), len(other))
    if abs(len(one) - len(other)) > (1 - ANLS_THRESHOLD) * longer:  # the distance is at least that; spares long texts
        return False
    return 1 - _levenshtein(one, other) / longer >= ANLS_THRESHOLD


def _levenshtein(one: str, other: str) -> int:
    """Return how many characters must be inserted, deleted or replaced to turn one text into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


# --- option -----------------------------------------------------------------------------------------------------------

_OPTION = re.compile(
    r"(?:(?:option|choice|answer|letter)\s*:?\s*)?"
    r"(?:[(\[{]\s*(?P<bracketed>[A-Za-z])\s*[)\]}]|(?P<open>[A-Za-z])(?:\)|(?=[.:,;]|\s+[-–—=]\s|$)))"
    r"\s*[.:,;=–—-]*\s*(?P<text>.*)",
    re.IGNORECASE | re.DOTALL,
)
# A second label: "(a) and (b)", "b) or c)", "c, not b". Single capitals in an option's text, "(a) point B", are none.
_OTHER_LABEL = re.compile(
    r"(?<!\w)[(\[][a-z][)\]](?!\w)|(?<![\w(\[])[a-z]\)(?!\w)|(?:\b(?:and|or|not)|[/&])\s*[(\[]?[A-Za-z][)\]]?(?![\w'])"
)
_LETTER = r"[(\[]?[A-Za-z][)\]]?"
_LIST = re.compile(rf"{_LETTER}(?:(?: ?[,;&] ?(?:and )?| and ){_LETTER})+")


def _option(text: str) -> tuple[str, str] | None:
    """Return the letter, in lower case, and the option's text ("" if there is none); None if no or two letters."""
    text = " ".join(re.sub(r"[*_`]", "", unwrap_latex(tidy(text))).split())
    option = _OPTION.fullmatch(text)
    if not option or _OTHER_LABEL.search(option["text"]) or _LIST.fullmatch(text):
        return None
    return (option["bracketed"] or option["open"]).lower(), option["text"].strip(" .")


def _letters(text: str, *, allow_single: bool = False) -> frozenset[str] | None:
    """Return the options of a list such as "b, c" or "(b) and (c)"; None if ``text`` is no such list."""
    text = " ".join(unwrap_latex(tidy(text)).split())
    if not (_LIST.fullmatch(text) or (allow_single and re.fullmatch(_LETTER, text))):
        return None
    return frozenset(re.findall(r"\b[a-z]\b", text.lower()))


def _judge_option(readings: Sequence[str], truth: str) -> bool | None:
    right_letters = _letters(truth)
    if right_letters:
        letters = _first(lambda reading: _letters(reading, allow_single=True), readings)
        return None if letters is None else letters == right_letters
    right = _option(truth)
    assert right is not None  # choose_verifier checked it
    option = _first(_option, readings)
    if option is None:
        return True if right[1] and any(_same_option_text(reading, right[1]) for reading in readings) else None
    same_letter = option[0] == right[0]
    if not right[1] or not option[1]:
        return same_letter
    # One option's letter with another's text: which of the two was meant?
    return same_letter if same_letter == _same_option_text(option[1], right[1]) else None


def _same_option_text(answer: str, truth: str) -> bool:
    read, right = read_quantity(answer), read_quantity(truth)
    return _is_close(read, right, Fraction(0)) if read and right else _same_words(answer, truth)


# --- number and math --------------------------------------------------------------------------------------------------


def _judge_number(readings: Sequence[str], truth: str) -> bool | None:
    right, read = read_quantity(truth), _first(read_quantity, readings)
    assert right is not None  # choose_verifier checked it
    is_year = right.digits and 1800 <= right.value <= 2100
    return None if read is None else _is_close(read, right, Fraction(0) if is_year else TOLERANCE)


def _is_close(read: Quantity, truth: Quantity, tolerance: Fraction) -> bool:
    """Return whether ``|read - truth| <= tolerance * |truth|``, in their units; a unit on one side only is ignored.

    45 %, 45 and 0.45 agree if one side has the percent sign and the other has none.
    """
    one, other = read.value, truth.value
    if read.unit and truth.unit:
        if read.unit != truth.unit:
            return False
        one, other = one * read.scale, other * truth.scale
    pairs = [(one, other)]
    if read.percent != truth.percent:
        pairs.append((one / 100, other) if read.percent else (one, other / 100))
    return any(abs(a - b) <= tolerance * abs(b) for a, b in pairs)


def _judge_math(readings: Sequence[str], truth: str) -> bool | None:
    if any(_same_text(reading, truth) for reading in readings):
        return True
    right, read = read_quantity(truth), _first(read_quantity, readings)
    if right and read:
        is_equal = _is_close(read, right, Fraction(0))
        if is_equal or (right.is_whole and read.is_whole):
            return is_equal
    if right is None and not _is_formula(truth):  # a truth in words
        return any(_same_words(reading, truth) for reading in readings)
    if not (_is_formula(readings[0]) and _is_formula(truth)):
        return None if read is None else False
    return _math_equal(readings[0], truth)


_NAMES = word_set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt inf infty infinity max min lim "
    "mod det gcd lcm deg degrees cup cap and left right"
)
# What sympy would work on for years: towers of powers, huge exponents and factorials.
_ENDLESS = re.compile(r"\^\s*\{?[^{}^]*[\^]|\^\s*[({]?\s*\d{5,}|\d{4,}\s*\)?\s*!|\)\s*!|!\s*!")


def _is_formula(text: str) -> bool:
    """Return whether math-verify may read it: nothing endless, and no words, which it takes for products of letters."""
    bare = re.sub(r"\\[A-Za-z]+", " ", text)
    words = re.findall(r"[A-Za-z]{3,}", bare)
    return len(text) <= 300 and not _ENDLESS.search(text) and all(word.lower() in _NAMES for word in words)


def _math_equal(answer: str, truth: str) -> bool | None:
    """Return what math-verify decides; None if it cannot read one of them or runs out of time."""
    from math_verify import parse
    from math_verify import verify as equal
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without a time limit
    # Its time limits are alarm signals, which only the main thread can set.
    seconds: Any = _MATH_SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        gold, read = (
            parse(f"${tidy(text)}$", parsing_timeout=seconds, raise_on_error=True) for text in (truth, answer)
        )
        if not gold or not read:
            return None
        return bool(equal(gold, read, timeout_seconds=seconds, raise_on_error=True))
    except (Exception, TimeoutException):  # sympy raises many kinds; the time limit's is no Exception
        return None


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Verifier:
    """Holds how answers are judged, the kind of truth they are compared with, and what reads one (None: not one)."""

    judge: Judge
    kind: str = "a text"
    reads_truth: Callable[[str], object] = bool


_VERIFIERS = {
    "exact": _Verifier(_text_judge(_same_text)),
    "option": _Verifier(_judge_option, "an option letter", lambda truth: _option(truth) or _letters(truth)),
    "number": _Verifier(_judge_number, "a number", read_quantity),
    "anls": _Verifier(_text_judge(_similar)),
    "vqa": _Verifier(_text_judge(_same_words)),
    "math": _Verifier(_judge_math),
}
VERIFIERS = (*_VERIFIERS, "auto")
