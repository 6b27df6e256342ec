"""Compares answers as texts: the same text apart from its form, or the same words."""

from __future__ import annotations

import re

from vlmpo.verifiers.characters import plain, unwrap_latex
from vlmpo.verifiers.languages import word_set, words
from vlmpo.verifiers.numbers import NUMBER_WORDS
from vlmpo.verifiers.sentences import said_of_subject, tidy

# Numbers with their sign, points and slashes; words; and every sign that is no punctuation: "5 %", "A-", "3√2".
_TOKEN = re.compile(
    r"(?<=[\d)])[!'\"]|(?<=\b\w)'(?!\w)|(?:(?<![\w)])[-+])?(?:\d+(?:[.,:/-]\d+)*|\.\d+)|\w+|(?<=\w)-(?!\w)|[^\w\s.,;:!?'\"()\[\]{}…–—/\\、。，·-]"
)
# Only before a word, and `a` not before a single letter: "vitamin A" and "a, b" contain no article.
_ARTICLE = re.compile(r"\b(?:(?:an|the)\s+(?=\w)|a\s+(?=\w\w|\d))")
_OTHER_ARTICLE = re.compile(rf"(?:{words('article')}\s+|[ld]['’])(?=\w)", re.IGNORECASE)
_NAME = re.compile(rf"(?=[A-ZÀ-Ý])(?i:{words('article')})\s+[A-ZÀ-Ý]")  # "El Salvador", "Die Hard"
YES, NO = (re.compile(words(field)) for field in ("yes", "no"))
_HEAD = re.compile(rf"(?P<head>{words('yes')}|{words('no')})\s*[,;.:!、。—–-]\s*(?P<rest>.*)", re.DOTALL)
DENIAL = re.compile(rf"\b(?:not|no|never|none|without|cannot)\b|n't|{words('denial')}")
_ORDINALS = {
    "first": "1st", "second": "2nd", "third": "3rd", "fourth": "4th", "fifth": "5th", "sixth": "6th", "seventh": "7th",
    "eighth": "8th", "ninth": "9th", "tenth": "10th", "eleventh": "11th", "twelfth": "12th",
}  # fmt: skip
_MOST_CASED = 4  # letters of a word whose case may have a meaning
_GENERIC = word_set("color colour colored coloured number shape word value category type side in of is")


def plain_text(text: str) -> str:
    """Even out case, white space, quotes around the text and punctuation at its end, unless nothing else is left.

    An exclamation mark goes after words only: ``5!`` is no 5. A question mark stays.
    """
    whole = plain(tidy(text)).casefold().replace("ё", "е")
    text = re.sub(r"(?<=[^\W\d_][^\W\d_])\s*!+$", "", whole.rstrip(".,;:。、 ")).rstrip(".,;:。、 ")
    quoted = re.fullmatch(r"[\"'「『]+\s*(.+?)[\s.,。、]*[\"'」』]+", text) or re.fullmatch(
        r"(.*[^\W\d])[\"」』]+|[\"'「『]+(.*)", text
    )
    return next((part for part in quoted.groups() if part), text) if quoted else text or whole


def same_text(answer: str, truth: str) -> bool:
    """Return whether two texts are the same apart from case, white space and punctuation at the end."""
    return plain_text(answer) == plain_text(truth)


def differs_in_case(answer: str, truth: str) -> bool:
    """Return whether two texts differ only in case, and in a way that may have a meaning: ``Bb``, ``CO``, ``10 MW``."""
    ones, others = (re.findall(r"[^\W\d_]+|\d+|\S", plain(tidy(text))) for text in (answer, truth))
    if ones == others or [one.casefold() for one in ones] != [other.casefold() for other in others]:
        return False
    before, after = ["", *ones], [*ones[1:], ""]
    return any(
        one != other and _has_case(one, other, before[i][-1:].isdigit() or (after[i] in set("+*/=^")))
        for i, (one, other) in enumerate(zip(ones, others, strict=True))
    )


def _has_case(one: str, other: str, is_symbol: bool) -> bool:
    """Return whether the case of a short word means something; that of "No", "NO" and "no", or "Red", does not."""
    word = one.casefold()
    if len(one) > _MOST_CASED or YES.fullmatch(word) or NO.fullmatch(word) or word in ("am", "pm"):
        return False
    if len(one) == 1 or (is_symbol and len(one) < _MOST_CASED):
        return is_symbol
    if len(one) == 2:
        return word not in (one, other) or word[0] == word[1]
    return not all(form in (form.lower(), form.upper(), form.title()) for form in (one, other))


def words_of(text: str) -> list[str]:
    """Return the words of ``text`` as VQA scoring compares them: no articles or punctuation, number words as digits.

    Signs, points and slashes inside numbers stay; separators of thousands go.
    """
    text = re.sub(r"(?<!\d)(?<!\b\w)'|(?<!\d)'(?=\w)", "", unwrap_latex(plain_text(text)))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", re.sub("[−–—]", "-", text))
    text = re.sub(r"[a-z]+", lambda word: _ORDINALS.get(word.group(), word.group()), _ARTICLE.sub("", text))
    found = _TOKEN.findall(re.sub(r"(?<=[^\W\d])\.(?=[^\W\d]|\s|$)", "", text))  # U.S.A.
    return [str(NUMBER_WORDS.get(word, word)) for word in found]


def same_words(answer: str, truth: str) -> bool:
    """Compare as VQA scoring does; "it is red" is read as red, and "yes, it does" as yes."""
    if same_text(answer, truth):
        return True
    right = words_of(truth)
    if not right:
        return False
    text = plain_text(answer)
    forms = [form for form in (text, said_of_subject(text)) if form]
    if re.search(r"(?<!y)\s+ones?\W*$", answer):  # "the red one", not "Formula One" nor "twenty one"
        forms += [re.sub(r"(?<!\bno)\s+ones?$", "", form) for form in forms]
    if not _NAME.match(tidy(answer)):
        forms += [_OTHER_ARTICLE.sub("", form, count=1) for form in forms if _OTHER_ARTICLE.match(form)]
    rights = [right, words_of(_OTHER_ARTICLE.sub("", plain_text(truth), count=1))]
    if any(words_of(form) in rights for form in forms):
        return True
    if _GENERIC & set(words_of(text)) and [word for word in words_of(text) if word not in _GENERIC] == right:
        return True  # the color blue
    joined = "".join(right)
    if not re.search(r"\d", joined) and "".join(words_of(text)) == joined:  # D. H. and D.H.
        return True
    return yes_or_no_of(text) == plain_text(truth)


def yes_or_no_of(text: str) -> str | None:
    """Return the "yes" or "no" that ``text`` begins with; None if there is none or the rest differs."""
    head = _HEAD.fullmatch(text)
    return head["head"] if head and not _contradicts(head["head"], head["rest"]) else None


def _contradicts(head: str, rest: str) -> bool:
    """Return whether what follows "yes," or "no," says the other thing."""
    other = NO if YES.fullmatch(head) else YES
    return bool({"yes", "no", "not"} & set(words_of(rest)) - ({"no", "not"} if head == "no" else set())) or (
        other.match(rest) is not None and rest != head
    )
