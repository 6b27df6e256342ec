"""Decides whether the final answer of a response is the true one.

The verdict is ``unparsed``, neither right nor wrong, if no final answer of the verifier's kind can be read: none is
stated, it is taken back or left open, a sentence is given instead of a letter, or two numbers instead of one. Nothing
is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmpo.data.records import Verdict
from vlmpo.errors import RecipeError, RecordError
from vlmpo.verifiers.answer import LONGEST_RESPONSE, FinalAnswer, find_final_answer
from vlmpo.verifiers.characters import same_length, shortened
from vlmpo.verifiers.doubt import contradicts, is_alternative, is_doubtful
from vlmpo.verifiers.judges import judge_anls, judge_exact, judge_math, judge_number, judge_vqa
from vlmpo.verifiers.names import is_name
from vlmpo.verifiers.numbers import read_quantity
from vlmpo.verifiers.options import is_option, judge_option, read_letters, read_option
from vlmpo.verifiers.readings import readings_of
from vlmpo.verifiers.sentences import tidy
from vlmpo.verifiers.texts import differs_in_case, same_text, same_words, words_of
from vlmpo.verifiers.values import is_expression, read_structure, same_value, squeezed

__all__ = ["VERIFIERS", "choose_verifier", "verify", "words_of"]

# An option's letter with more: its text, or another sentence.
_LABELLED = re.compile(r"[*_(]*[A-J][)*_]*(?:[.:]|,(?=\s+[a-z])|\s+[-–—])\s+(?P<text>.+)", re.DOTALL)


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
            ``anls``: normalised Levenshtein similarity, ``1 - distance / longer length``, at least 0.5, of single words
            at least 0.8 (between the two: unparsed); digits and denials must agree; opposites and others of one kind
            (``June``, ``July``) do not.
            ``vqa``: the same words apart from articles, punctuation and case; number words are digits; the same yes,
            no, number or colour in another language.
            ``math``: mathematically equal: numbers exactly, formulas to 35 digits; points, intervals, sets and lists
            part by part.
            ``auto``: by the form of the truth: ``option`` for a letter from A to J, alone or with a text; ``math`` for
            whole numbers, fractions, formulas, points, intervals, sets and lists; ``number`` for decimals and
            percentages; otherwise ``vqa``.

    Returns:
        The verdict: ``status`` is ``correct``, ``wrong`` or ``unparsed``; ``parsed`` the final answer as read, None if
        unparsed; ``verifier`` the one that decided, never ``auto``.

    Raises:
        RecipeError: the verifier is not known.
        RecordError: ``truth_unreadable``: the truth is empty or not of the verifier's kind.
    """
    name = choose_verifier(truth, verifier)
    if len(response) > LONGEST_RESPONSE:
        return Verdict("unparsed", None, name)
    response, truth = shortened(response), shortened(truth)
    if same_text(response, truth) and not differs_in_case(response, truth):
        return Verdict("correct", tidy(response), name)
    found = find_final_answer(response)
    agrees = None if found is None else _agrees(found, truth, _VERIFIERS[name])
    if found is None or agrees is None or (found.is_sentence and not agrees):
        return Verdict("unparsed", None, name)
    return Verdict("correct" if agrees else "wrong", found.text, name)


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
    if is_option(text) or read_letters(text):
        return "option"
    if is_name(text):
        return "vqa"
    if re.search(r"[\\^√∛π∞]|^[\s\d.+-]+/[\s\d.]+$", text):
        return "math"
    quantity = read_quantity(text)
    if quantity is None or re.search(r"[A-Za-z]{3,}\s+[A-Za-z]{3,}|^[A-Za-z]", text):
        structure = read_structure(text)
        if quantity is None and _is_formula(text):
            return "math"
        return "vqa" if quantity or structure is None or structure.kind in ("colon", "by") else "math"
    is_exact = quantity.is_whole and not quantity.percent and not re.search(r"\.\d", text)
    return "math" if is_exact else "number"


def _is_formula(text: str) -> bool:
    """Return whether ``text`` is a formula with letters or signs in it, ``2x + 1``; ``3-4`` and ``3rd`` are not."""
    has_signs = re.search(r"[A-Za-z*+^]", text) and re.search(r"[\d+*/]", text)
    return bool(has_signs) and is_expression(text) and not re.search(r"\d(?:st|nd|rd|th)$", text)


# Decide whether one of the readings of a final answer, shortest first, agrees with the truth; None: it cannot be read.
Judge = Callable[[Sequence[str], str], bool | None]


def _agrees(found: FinalAnswer, truth: str, verifier: _Verifier) -> bool | None:
    """Return the verdict on an answer; what takes it back or leaves it open is asked first, for every verifier."""
    text = found.text
    right = read_option(truth, is_truth=True) if verifier.judge is judge_option else None
    targets, readings = [truth, *(right[1:] if right else [])], readings_of(text)
    if any(differs_in_case(reading, target) for reading in readings for target in targets):
        return None
    if _is_cut_off(text) and not _is_cut_off(truth):
        return None
    if same_text(text, truth) or (right and right[1] and same_words(text, right[1])):
        return True
    if found.is_remark:
        return None
    shape = same_length(text)
    is_open = right is None and (is_alternative(truth) or _is_set(truth))  # "x = 2 or x = 3" is what was asked for
    if is_doubtful(_without_or(shape) if is_open else shape):
        return None
    labelled = None if is_name(text) else _LABELLED.fullmatch(text)
    if contradicts(text[len(readings[0]) :], readings[0]) or (labelled and contradicts(labelled["text"], text)):
        return None
    if is_alternative(readings[0]) or (is_open and is_alternative(truth)):
        return same_value(text, truth) if is_open else None
    if is_name(truth) and any(re.fullmatch(r"\W*[A-Za-z]\W*", reading) for reading in readings):
        return None  # a letter is not the whole name, and no other one
    verdict = verifier.judge(readings, truth)
    if is_option(truth) or read_letters(truth):  # whatever the verifier, another letter is not right, nor "B" wrong
        as_option = judge_option(readings, truth)
        return verdict if verdict == as_option else None
    return None if verdict is False and _may_have_unit(readings, truth) else verdict


def _may_have_unit(readings: Sequence[str], truth: str) -> bool:
    """Return whether an answer is the truth with letters after it that may be a unit: ``5 C``, ``5 N·m``."""
    right = squeezed(truth)
    unit = re.compile(re.escape(right) + ("" if right[-1:] in ")}" else " ") + r"[A-Za-zΩµμ°*/^{}()\d-]{1,12}")
    if not re.search(r"[\d)}]$", right):
        return False
    return any(unit.fullmatch(squeezed(text)) and not read_quantity(text) for text in readings)


def _is_cut_off(text: str) -> bool:
    return re.search(r"(?:\.\.|…)\W*$", text) is not None


def _without_or(text: str) -> str:
    return re.sub(r",?\s+(?:or|o|ou|oder|или)\s+", " ", text)


def _is_set(truth: str) -> bool:
    structure = read_structure(truth)
    return structure is not None and structure.kind in ("set", "union")


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Verifier:
    """Holds how answers are judged, the kind of truth they are compared with, and what reads one (None: not one)."""

    judge: Judge
    kind: str = "a text"
    reads_truth: Callable[[str], object] = bool


_VERIFIERS = {
    "exact": _Verifier(judge_exact),
    "option": _Verifier(
        judge_option, "an option letter", lambda truth: read_option(truth, is_truth=True) or read_letters(truth)
    ),
    "number": _Verifier(judge_number, "a number", read_quantity),
    "anls": _Verifier(judge_anls),
    "vqa": _Verifier(judge_vqa),
    "math": _Verifier(judge_math),
}
VERIFIERS = (*_VERIFIERS, "auto")
