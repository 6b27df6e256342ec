"""Judges answers by each verifier but `option`: whether one of an answer's readings is the truth.

Readings come shortest first; a judge returns None if they cannot be compared with the truth.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from vlmpo.verifiers.characters import plain
from vlmpo.verifiers.doubt import is_remark
from vlmpo.verifiers.forms import is_homograph, may_be_same, read_date, same_meaning
from vlmpo.verifiers.languages import EAST_ASIAN, UNKNOWN_SCRIPT, words
from vlmpo.verifiers.likeness import likeness_of
from vlmpo.verifiers.numbers import read_quantity
from vlmpo.verifiers.sentences import is_sentence, said_of_subject
from vlmpo.verifiers.texts import DENIAL, NO, YES, plain_text, same_text, same_words, words_of
from vlmpo.verifiers.values import is_expression, read_structure, same_quantity, same_value, squeezed
from vlmpo.verifiers.vocabulary import HOMOGRAPHS, OTHER_LANGUAGES

TOLERANCE = Fraction(5, 100)
# Of texts, and of single words: between the two nothing is said of words.
ANLS_THRESHOLD, WORD_THRESHOLD = 0.5, 0.8
_SCRIPTS = [re.compile(f"[{signs}]") for signs in ("A-Za-zÀ-ÖØ-öø-ɏ", "Ѐ-ӿ", f"{EAST_ASIAN}々")]
_EXTRA = 2  # words beside those of the truth that make an answer a sentence around it; "dark red" is another colour


def judge_exact(readings: Sequence[str], truth: str) -> bool | None:
    """Return whether an answer is the same text; None if it is none."""
    if any(same_text(reading, truth) for reading in readings):
        return True
    return None if _is_no_answer(readings, truth) else False


def judge_vqa(readings: Sequence[str], truth: str) -> bool | None:
    """Return whether an answer has the same words, or means the same yes, number or colour in another language."""
    if read_quantity(truth) is None and _is_made_of_parts(truth):
        return _first_verdict(readings, truth)
    if any(same_words(reading, truth) for reading in readings):
        return True
    meant = same_meaning(readings[0], truth)
    if meant is not None:
        return None if meant and is_homograph(readings[0], truth) else meant
    dates = read_date(readings[0]), read_date(truth)
    if all(dates):
        return dates[0] == dates[1]
    if any(may_be_same(reading, truth) or _is_same_number(reading, truth) for reading in readings):
        return None
    return None if _is_no_answer(readings, truth) or _holds_truth(readings[-1], truth) else False


def judge_anls(readings: Sequence[str], truth: str) -> bool | None:
    """Apply ANLS at its threshold: a misread letter is forgiven; other digits, or a denial on one side, are not."""
    read, right = read_quantity(readings[0]), read_quantity(truth)
    if right is None and _is_made_of_parts(truth):
        return _first_verdict(readings, truth)
    if any(same_words(reading, truth) for reading in readings):
        return True
    if re.search(r"\d", truth) and (right or is_expression(truth)):  # 3π is no misread 3
        return same_quantity(read, right) if read and right else _first_verdict(readings, truth)
    if _is_no_answer(readings, truth):
        return None
    likeness = max(likeness_of(reading, truth) for reading in readings)
    counts = {len(text.split()) for text in (truth, readings[0])}
    if likeness >= (WORD_THRESHOLD if len(counts) == 1 or 1 in counts else ANLS_THRESHOLD):
        return True
    return None if likeness >= ANLS_THRESHOLD or _holds_truth(readings[-1], truth) else False


def judge_number(readings: Sequence[str], truth: str) -> bool | None:
    """Return whether an answer is within the tolerance of the truth; a year must be the year."""
    right = read_quantity(truth)
    assert right is not None  # choose_verifier checked it
    read = next((quantity for reading in readings if (quantity := read_quantity(reading))), None)
    if read is None:
        return None
    is_year = right.digits and 1800 <= right.value <= 2100
    exact = same_quantity(read, right)
    if exact or is_year:
        return exact
    close = same_quantity(read, right, TOLERANCE)
    return None if close and re.fullmatch(r"\d+,\d{1,2}", truth.strip()) else close  # 3,5 may be two numbers


def judge_math(readings: Sequence[str], truth: str) -> bool | None:
    """Return whether an answer is mathematically equal to the truth."""
    if any(same_text(reading, truth) or squeezed(reading) == squeezed(truth) for reading in readings):
        return True
    if _is_words(truth):
        return judge_vqa(readings, truth)
    return _first_verdict(readings, truth)


def _is_words(truth: str) -> bool:
    """Return whether a truth is no value but a word: ``\\text{red}``."""
    if plain_text(truth) in HOMOGRAPHS:
        return True
    return read_quantity(truth) is None and read_structure(truth) is None and same_value("1", truth) is None


def _is_made_of_parts(truth: str) -> bool:
    return read_structure(truth) is not None or ("\\" in truth and is_expression(truth))


def _first_verdict(readings: Sequence[str], truth: str) -> bool | None:
    return next((verdict for reading in readings if (verdict := same_value(reading, truth)) is not None), None)


def _is_same_number(answer: str, truth: str) -> bool:
    """Return whether two texts are one number in two forms, ``10²`` and 100; 5 and 5 % are not."""
    if not re.search(r"\d", truth) or ("%" in plain(answer)) != ("%" in plain(truth)):
        return False
    return same_value(answer, truth) is True


def _is_no_answer(readings: Sequence[str], truth: str) -> bool:
    """Return whether an answer that differs from the truth is no answer: a remark, a sentence, a language not read."""
    core, whole = readings[0], readings[-1]
    if not is_remark(core):
        core = said_of_subject(core) or core
    if is_remark(core) or is_remark(whole):
        return True
    if is_sentence(core) and not (is_sentence(truth) and len(truth.split()) > 3):
        return True
    if any(UNKNOWN_SCRIPT.search(plain(text)) for text in (whole, truth)):
        return True
    scripts = [{i for i, script in enumerate(_SCRIPTS) if script.search(plain(text))} for text in (core, truth)]
    if scripts[0] and scripts[1] and not scripts[0] & scripts[1]:
        return True
    return len(core.split()) > 1 and bool(OTHER_LANGUAGES & set(plain_text(core).split()))


def _holds_truth(answer: str, truth: str) -> bool:
    """Return whether an answer says more than the truth, "the colour blue", without denying or listing it."""
    said, right = plain_text(answer), words_of(truth)
    if (
        not right
        or DENIAL.search(said)
        or re.search(rf"{words('both')}|,", said)
        or (same_meaning(truth, truth) and len(right) == 1 and (YES.fullmatch(right[0]) or NO.fullmatch(right[0])))
    ):
        return False
    if _SCRIPTS[2].search(said):
        plain_truth = plain_text(truth)
        return plain_truth in said or said in plain_truth
    found = words_of(answer)
    if len(found) > len(right) and found[: len(right)] == right:
        return True
    return (
        any(found[i : i + len(right)] == right for i in range(len(found) - len(right) + 1))
        and len(found) >= len(right) + _EXTRA
    )
