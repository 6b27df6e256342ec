"""Reads option letters, with the option's text or in lists, and compares them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from vlmpo.verifiers.characters import plain, unwrap_latex
from vlmpo.verifiers.languages import words
from vlmpo.verifiers.names import is_name
from vlmpo.verifiers.numbers import read_quantity
from vlmpo.verifiers.sentences import tidy
from vlmpo.verifiers.texts import same_words
from vlmpo.verifiers.values import same_quantity

_PREFIX = rf"(?:(?:the|la|el|le|die|der|a|o|l')\s+)?(?:(?:{words('option')})\s*:?\s*|#\s*)?"
_SUFFIX = r"(?:\s*(?:选项|選項|项|項|番|です|だ)(?=$|[.。,:]))?"
_OPTION = re.compile(
    _PREFIX
    + r"(?:[(\[{]\s*(?P<bracketed>[A-Za-z])\s*[)\]}]|(?P<open>[A-Za-z])"
    + _SUFFIX
    + r"(?P<mark>\)|(?=[.:,;、。]|\s+[-–—]\s|$)))"
    + _SUFFIX
    + r"\s*[.:,;、。–—-]*\s*(?P<text>.*)",
    re.IGNORECASE | re.DOTALL,
)
_TEXT_FIRST = re.compile(
    r"(?P<text>[^()]+?)\s*[(\[](?:(?:option|choice|answer)\s+)?(?P<letter>[A-J])[)\]]", re.IGNORECASE
)
_DENIED = re.compile(
    rf"{words('denial', 'condition', 'limit', 'rejected', 'fault')}|either|all|any|[A-Za-z]+ (?:of|out|than|from)$",
    re.IGNORECASE,
)
# A second label: "(a) and (b)", "b) or c)", "c, not b". Single capitals in an option's text, "(a) point B", are none.
_OTHER_LABEL = re.compile(
    r"(?<!\w)[(\[][a-z][)\]](?!\w)|(?<![\w(\[])[a-z]\)(?!\w)"
    rf"|(?:{words('both', 'alternative')}|\b(?:not|no|non|não|nicht|не)\s|[/&、])\s*"
    r"[(\[]?[A-Za-z][)\]]?(?![\w'])|^[(\[]?[A-J][)\]]?(?:[.:,;!]|$)"
)
_LETTER = r"[(\[]?(?:(?i:option|choice) )?[A-Za-z][)\]]?"
_BOTH = words("both")
_LIST = re.compile(
    rf"(?:(?i:options?|choices?|both|answers?|选项|選項)\s*)?{_LETTER}"
    rf"(?:(?: ?[,;&、/] ?(?:and )?| ?{_BOTH} ?){_LETTER})+\.?"
)


def read_option(text: str, *, is_truth: bool = False) -> tuple[str, str] | None:
    """Return the letter, in lower case, and the option's text ("" if there is none); None if no or two letters.

    In a truth the first letter counts, whatever the text: ``D. Both A and B``.
    """
    text = _one_line(text)
    if is_name(text):
        return None
    first, option = _TEXT_FIRST.fullmatch(text), _OPTION.fullmatch(text)
    if first and not option and not _DENIED.match(first["text"]):
        return first["letter"].lower(), first["text"].strip(" .")
    if is_truth and re.fullmatch(r"\(?[A-Za-z]\)?", text):
        return text.strip("()").lower(), ""
    if not option or _LIST.fullmatch(text) or (_OTHER_LABEL.search(option["text"]) and not is_truth):
        return None
    return (option["bracketed"] or option["open"]).lower(), option["text"].strip(" .。")


def read_letters(text: str, *, allow_single: bool = False) -> tuple[str, ...] | None:
    """Return the options of a list such as "b, c" or "(b) and (c)", in its order; None if ``text`` is no such list."""
    text = _one_line(text)
    if not (_LIST.fullmatch(text) or (allow_single and re.fullmatch(_PREFIX + _LETTER, text, re.IGNORECASE))):
        return None
    return tuple(re.findall(r"(?<![A-Za-z])[a-z](?![A-Za-z])", re.sub(_BOTH, ",", text, flags=re.IGNORECASE).lower()))


def _one_line(text: str) -> str:
    """Return ``text`` in plain characters, without emphasis and ``$``; the asterisk of ``A*`` stays."""
    text = re.sub(r"\*\*|__|[`$]|([*_])(?=\S)(.*?\S)\1", r"\2", unwrap_latex(plain(tidy(text))))
    return tidy(" ".join(text.split()))


@lru_cache(maxsize=1024)
def is_option(truth: str) -> bool:
    """Return whether a truth is an option, A to J: a letter, alone or with a text; not a name such as "E. coli"."""
    text = " ".join(plain(tidy(truth)).split())
    if is_name(text):
        return False
    letter = r"\([A-Ja-j]\)|\[[A-Ja-j]\]|[A-Ja-j]\)"
    labelled = rf"(?:{words('option')})\s*:?\s*(?:{letter}|[A-J])(?:[.:)]?$|[.:)]\s*\S.*|\s+[-–—]\s+\S.*)"
    if re.fullmatch(rf"\(?[A-Ja-j]\)?\.?|(?:{letter})(?:\s*\S.*)?", text) or re.fullmatch(
        labelled, text, re.IGNORECASE
    ):
        return True
    return (
        re.fullmatch(r"[A-J](?:[:、]\s*|\.\s+|\.(?=[^\W\d_a-z.])(?![A-Z]\b)|\s+[-–—]\s+)\S.*", text) is not None
        and len(text) > 2
    )


def judge_option(readings: Sequence[str], truth: str) -> bool | None:
    """Return whether an answer names the right option; None if it names none, several, or one with another's text."""
    right_letters = read_letters(truth)
    if right_letters:
        return _judge_letters(readings, right_letters)
    right = read_option(truth, is_truth=True)
    assert right is not None  # choose_verifier checked it
    options = [option for reading in readings if (option := read_option(reading))]
    if not options:
        return True if right[1] and any(_same_option_text(reading, right) for reading in readings) else None
    letters = {option[0] for option in options}
    if len(letters) > 1:
        return None
    same_letter = letters == {right[0]}
    texts = [option[1] for option in options]
    if not right[1] or "" in texts:
        return same_letter
    # One option's letter with another's text: which of the two was meant?
    return same_letter if same_letter == any(_same_option_text(text, right) for text in texts) else None


def _judge_letters(readings: Sequence[str], right: tuple[str, ...]) -> bool | None:
    """Compare lists of letters in any order; if the truth's is not the alphabet's, the order may be what was asked."""
    for reading in readings:
        letters = read_letters(reading, allow_single=True)
        if letters is None and re.fullmatch("[A-J]{2,}", reading.strip()) and list(reading) == sorted(set(reading)):
            letters = tuple(reading.strip().lower())
        if letters is not None and set(letters) == set(right) and letters != right and right != tuple(sorted(right)):
            return None
        if letters is not None:
            return set(letters) == set(right)
    return None


def _same_option_text(answer: str, right: tuple[str, str]) -> bool:
    read, quantity = read_quantity(answer), read_quantity(right[1])
    if read and quantity and read.percent == quantity.percent:
        return same_quantity(read, quantity) is True
    return same_words(answer, right[1]) or same_words(answer, f"{right[0]} {right[1]}")
