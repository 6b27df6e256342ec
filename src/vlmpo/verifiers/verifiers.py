"""A response against the truth: correct, wrong, or unparsed. Never guesses.

``unparsed`` says that no final answer of the verifier's kind could be read: none is stated, or a letter is asked for
and a sentence given, or two numbers stand where one should. It counts neither as wrong nor as right.
"""

from __future__ import annotations

import logging
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from vlmpo.data.records import Verdict
from vlmpo.errors import RecipeError, RecordError
from vlmpo.verifiers.answer import first_sentence, parse_final_answer, tidy, word_set
from vlmpo.verifiers.numbers import NUMBER_WORDS, Quantity, read_quantity

TOLERANCE = Fraction(5, 100)
ANLS_THRESHOLD = 0.5
_MATH_SECONDS = 5

# Says of a final answer (text) and the truth whether they agree; None: it cannot read the answer.
Judge = Callable[[str, str], bool | None]


def verify(response: str, truth: str, verifier: str = "auto") -> Verdict:
    """Hold the final answer of ``response`` against ``truth``, the truth.

    Args:
        response: a whole response; see :func:`vlmpo.verifiers.answer.parse_final_answer` for what is read from it.
        truth: the right answer, on one line.
        verifier:
            ``exact``: the same text, but for case, white space and a full stop.
            ``option``: the same letter, ``e``, ``(e)`` or ``e) 46670``; the option's text where the truth has it; the
            same letters, where the truth is a list such as ``b, c``.
            ``number``: within 5 % of the truth, as charts are read; a truth of 0, or one in plain digits from 1800 to
            2100, which is a year, exactly.
            ``anls``: normalised Levenshtein similarity, ``1 - distance / longer length``, at least 0.5; digits and
            denials must agree.
            ``vqa``: the same words without articles, punctuation, case; number words are digits.
            ``math``: mathematically equal; numbers exactly, everything else through math-verify.
            ``auto``: by the truth's form: ``option`` for a letter, ``math`` for whole numbers, fractions and LaTeX,
            ``number`` for decimals and percentages, else ``vqa``.

    Returns:
        The verdict; its verifier is the one that decided, never ``auto``.

    Raises:
        RecipeError: no such verifier.
        RecordError: ``truth_unreadable``: the truth is empty, or not what the verifier is for.
    """
    name = choose_verifier(truth, verifier)
    parsed = parse_final_answer(response)
    agrees = None if parsed is None else _JUDGES[name](parsed, truth)
    if agrees is None:
        return Verdict("unparsed", None, name)
    return Verdict("correct" if agrees else "wrong", parsed, name)


def choose_verifier(truth: str, verifier: str = "auto") -> str:
    """The verifier that decides for this truth: ``verifier``, or what its form calls for. Raises as :func:`verify`."""
    if verifier not in VERIFIERS:
        raise RecipeError(f"verifier {verifier!r} is not known; use one of {', '.join(VERIFIERS)}")
    if not truth.strip():
        raise RecordError("truth_unreadable", "", "the answer is empty: there is nothing to hold a response against")
    name = _by_form(truth) if verifier == "auto" else verifier
    if (name == "number" and read_quantity(truth) is None) or (
        name == "option" and _option(truth) is None and _letters(truth) is None
    ):
        kind = "number" if name == "number" else "option letter"
        detail = f"verifier {name}: the answer {truth!r:.80} is no {kind}; name another verifier for this question"
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

_CONTRAST = re.compile(r"\s*[,;(]\s*(?:and |but )?(?:not|rather than|instead of|as opposed to)\b.*", re.IGNORECASE)
_RETRACTED = re.compile(r"\d|\b(?:wait|no|not|actually|sorry|but|however|or|correction)\b|n't", re.IGNORECASE)


def _readings(parsed: str) -> Iterator[str]:
    """The answer as it stands; then without ", not ..." after it; then without sentences after it that add nothing."""
    yield parsed
    if (shorter := _CONTRAST.sub("", parsed)) not in ("", parsed):
        yield shorter
    first = first_sentence(parsed)
    if first != parsed and not _RETRACTED.search(parsed[len(first) :]):
        yield first


def _text_judge(same: Callable[[str, str], bool]) -> Judge:
    return lambda parsed, truth: any(same(reading, truth) for reading in _readings(parsed))


# --- exact, vqa, anls -------------------------------------------------------------------------------------------------

# Numbers with their sign, points and slashes; words; and the signs that tell "5 %" from "5", "A-" from "A".
_TOKEN = re.compile(r"(?:(?<![\w)])[-+])?(?:\d+(?:[.,:/-]\d+)*|\.\d+)|\w+|[%$€£°+#&=<>≤≥^*@]|(?<=\w)-(?!\w)")
# Before a word only, and `a` not before a single letter: "vitamin A" and "a, b" hold none.
_ARTICLE = re.compile(r"\b(?:(?:an|the)\s+(?=\w)|a\s+(?=\w\w|\d))")
_COPULA = re.compile(r"(?:it|this|that|they|the(?:\s+[\w-]+){1,6})\s+(?:is|are|was|were)\s+(?P<rest>.+)", re.IGNORECASE)
_DENIAL = re.compile(r"\b(?:not|no|never|none|without|cannot)\b|n't", re.IGNORECASE)


def _plain(text: str) -> str:
    """Case, white space, quotes around and punctuation at the end evened out; as it is where nothing else is there."""
    whole = " ".join(unicodedata.normalize("NFKC", tidy(text)).casefold().split())
    text = whole.rstrip(".,;:!? ").strip("\"'“”‘’ ")
    return text or whole


def _same_text(one: str, other: str) -> bool:
    return _plain(one) == _plain(other)


def words_of(text: str) -> list[str]:
    """The words of ``text`` as VQA scoring has them: no articles, no punctuation, number words as digits.

    Signs, points and slashes inside numbers stay, separators of thousands go.
    """
    text = re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", _plain(text)).replace("’", "").replace("'", "")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", re.sub("[−–—]", "-", text))
    text = _ARTICLE.sub("", text)
    words = _TOKEN.findall(re.sub(r"(?<=[^\W\d])\.(?=[^\W\d]|\s|$)", "", text))  # U.S.A.
    return [str(NUMBER_WORDS.get(word, word)) for word in words]


def _same_words(one: str, other: str) -> bool:
    """Equal as VQA scoring has it; "it is red" says red, and "yes, it does" says yes."""
    if _same_text(one, other):
        return True
    truth = words_of(other)
    if not truth:
        return False
    said = _COPULA.fullmatch(_plain(one))
    if words_of(one) == truth or (said is not None and words_of(said["rest"]) == truth):
        return True
    head = re.match(r"(yes|no)\s*[,;.:!-]\s*(.*)", _plain(one))
    return head is not None and truth == [head[1]] and not {"yes", "no", "not"} & set(words_of(head[2]))


def _similar(one: str, other: str) -> bool:
    """ANLS at the threshold. A misread letter is forgiven; other digits, or a denial on one side, are not."""
    one, other = _plain(one), _plain(other)
    digits = [re.sub(r"\D", "", text) for text in (one, other)]
    if digits[0] != digits[1] or bool(_DENIAL.search(one)) != bool(_DENIAL.search(other)):
        return False
    longer = max(len(one), len(other))
    if abs(len(one) - len(other)) > (1 - ANLS_THRESHOLD) * longer:  # the distance is at least that; spares long texts
        return False
    return 1 - _distance(one, other) / longer >= ANLS_THRESHOLD


def _distance(one: str, other: str) -> int:
    """Levenshtein: how many characters must be put in, taken out or changed."""
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
    """Letter, in lower case, and the option's text ("" where there is none); None where no letter is named, or two."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", tidy(text))
    text = re.sub(r"[*_`]", "", text)
    found = _OPTION.fullmatch(text)
    if not found or _OTHER_LABEL.search(found["text"]) or _LIST.fullmatch(text):
        return None
    return (found["bracketed"] or found["open"]).lower(), found["text"].strip(" .")


def _letters(text: str, one: bool = False) -> frozenset[str] | None:
    """The options of a list such as "b, c" or "(b) and (c)"; ``one``: or a single one. None where it is none."""
    text = re.sub(r"\s+", " ", re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}", r"\1", tidy(text)))
    if not (_LIST.fullmatch(text) or (one and re.fullmatch(_LETTER, text))):
        return None
    return frozenset(re.findall(r"\b[a-z]\b", text.lower()))


def _judge_option(parsed: str, truth: str) -> bool | None:
    several = _letters(truth)
    if several:
        picked = next((letters for reading in _readings(parsed) if (letters := _letters(reading, one=True))), None)
        return None if picked is None else picked == several
    right = _option(truth)
    assert right is not None  # choose_verifier has seen to it
    read = next((option for reading in _readings(parsed) if (option := _option(reading))), None)
    if read is None:
        return True if right[1] and any(_same_option_text(r, right[1]) for r in _readings(parsed)) else None
    if not right[1] or not read[1]:
        return read[0] == right[0]
    same_text = _same_option_text(read[1], right[1])
    # One's letter with the other's text: which of the two was meant?
    return same_text if same_text == (read[0] == right[0]) else None


def _same_option_text(one: str, other: str) -> bool:
    numbers = read_quantity(one), read_quantity(other)
    if numbers[0] and numbers[1]:
        return _close(numbers[0], numbers[1], Fraction(0))
    return _same_words(one, other)


# --- number and math --------------------------------------------------------------------------------------------------


def _quantity(parsed: str) -> Quantity | None:
    return next((found for reading in _readings(parsed) if (found := read_quantity(reading))), None)


def _judge_number(parsed: str, truth: str) -> bool | None:
    right, read = read_quantity(truth), _quantity(parsed)
    assert right is not None  # choose_verifier has seen to it
    is_year = right.digits and 1800 <= right.value <= 2100
    return None if read is None else _close(read, right, Fraction(0) if is_year else TOLERANCE)


def _close(read: Quantity, truth: Quantity, tolerance: Fraction) -> bool:
    """Whether ``|read - truth| <= tolerance * |truth|``, in the units stated; a unit only one side states is left out.

    45 %, 45 and 0.45 agree where one side has the percent sign and the other has none.
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


def _judge_math(parsed: str, truth: str) -> bool | None:
    if any(_same_text(reading, truth) for reading in _readings(parsed)):
        return True
    right, read = read_quantity(truth), _quantity(parsed)
    if right and read and (_close(read, right, Fraction(0)) or (right.is_whole and read.is_whole)):
        return _close(read, right, Fraction(0))
    if right is None and not _is_formula(truth):  # a truth in words
        return _text_judge(_same_words)(parsed, truth)
    if not (_is_formula(parsed) and _is_formula(truth)):
        return None if read is None else False
    return _math_equal(parsed, truth)


_NAMES = word_set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt inf infty infinity max min lim "
    "mod det gcd lcm deg degrees cup cap and left right"
)
# What sympy would work on for years, once it is told to: towers of powers, huge exponents and factorials.
_ENDLESS = re.compile(r"\^\s*\{?[^{}^]*[\^]|\^\s*[({]?\s*\d{5,}|\d{4,}\s*\)?\s*!|\)\s*!|!\s*!")


def _is_formula(text: str) -> bool:
    """Whether math-verify may read it: no words, which it would take for products of letters, and nothing endless."""
    bare = re.sub(r"\\[A-Za-z]+", " ", text)
    words = re.findall(r"[A-Za-z]{3,}", bare)
    return len(text) <= 300 and not _ENDLESS.search(text) and all(word.lower() in _NAMES for word in words)


def _math_equal(parsed: str, truth: str) -> bool | None:
    """What math-verify says; None where it can read no answer, or comes to no end."""
    from math_verify import parse
    from math_verify import verify as equal
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without a time limit
    # Its time limits are alarm signals, which only the main thread can set.
    seconds: Any = _MATH_SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        gold, read = (
            parse(f"${tidy(text)}$", parsing_timeout=seconds, raise_on_error=True) for text in (truth, parsed)
        )
        if not gold or not read:
            return None
        return bool(equal(gold, read, timeout_seconds=seconds, raise_on_error=True))
    except (Exception, TimeoutException):  # sympy raises many kinds; the time limit's is no Exception
        return None


_JUDGES: dict[str, Judge] = {
    "exact": _text_judge(_same_text),
    "option": _judge_option,
    "number": _judge_number,
    "anls": _text_judge(_similar),
    "vqa": _text_judge(_same_words),
    "math": _judge_math,
}
VERIFIERS = (*_JUDGES, "auto")
