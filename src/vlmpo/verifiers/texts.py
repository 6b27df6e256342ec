"""Compares answers in words: the same text, the same words, or nearly the same letters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlmpo.verifiers.characters import plain, unwrap_latex
from vlmpo.verifiers.doubt import is_remark
from vlmpo.verifiers.languages import (
    COLOURS,
    EAST_ASIAN,
    HOMOGRAPHS,
    NUMBERS,
    OTHER_LANGUAGES,
    UNKNOWN_SCRIPT,
    word_set,
    words,
)
from vlmpo.verifiers.numbers import NUMBER_WORDS, read_quantity
from vlmpo.verifiers.sentences import is_sentence, said_of_subject, tidy
from vlmpo.verifiers.values import is_expression, read_structure, same_quantity, same_value

ANLS_THRESHOLD, _WORD_THRESHOLD = 0.5, 0.8  # of texts, and of single words: between the two nothing is said of words
# Numbers with their sign, points and slashes; words; and every sign that is no punctuation: "5 %", "A-", "3√2".
_TOKEN = re.compile(
    r"(?<=[\d)])[!'\"]|(?<=\b\w)'(?!\w)|(?:(?<![\w)])[-+])?(?:\d+(?:[.,:/-]\d+)*|\.\d+)|\w+|(?<=\w)-(?!\w)|[^\w\s.,;:!?'\"()\[\]{}…–—/\\、。，·-]"
)
# Only before a word, and `a` not before a single letter: "vitamin A" and "a, b" contain no article.
_ARTICLE = re.compile(r"\b(?:(?:an|the)\s+(?=\w)|a\s+(?=\w\w|\d))")
_LITTLE = re.compile(rf"to|at|in|on|of|from|by|the|under|it|with|for|{words('article')}")
_OTHER_ARTICLE = re.compile(rf"(?:{words('article')}\s+|[ld]['’])(?=\w)", re.IGNORECASE)
_NAME = re.compile(rf"(?=[A-ZÀ-Ý])(?i:{words('article')})\s+[A-ZÀ-Ý]")  # "El Salvador", "Die Hard"
_DENIAL = re.compile(rf"\b(?:not|no|never|none|without|cannot)\b|n't|{words('denial')}")
_YES, _NO = (re.compile(words(field)) for field in ("yes", "no"))
_HEAD = re.compile(rf"(?P<head>{words('yes')}|{words('no')})\s*[,;.:!、。—–-]\s*(?P<rest>.*)", re.DOTALL)
_SCRIPTS = [re.compile(f"[{signs}]") for signs in ("A-Za-zÀ-ÖØ-öø-ɏ", "Ѐ-ӿ", f"{EAST_ASIAN}々")]
# Words so alike that one is taken for a misreading of the other, and so unlike in what they say.
_UNLIKE = [
    word_set(group)
    for group in (
        "january february march april may june july august september october november december",
        "monday tuesday wednesday thursday friday saturday sunday",
        "north south east west northeast northwest southeast southwest northern southern eastern western",
        "increase decrease increases decreases increased decreased increasing decreasing",
        "one two three four five six seven eight nine ten eleven twelve",
        *("left right", "top bottom", "true false", "yes no", "male female", "man woman", "men women", "more less"),
        *("up down", "first last", "before after", "above below", "higher lower", "highest lowest", "maximum minimum"),
        *("max min", "open closed", "inside outside", "import export imports exports", "internal external", "hot cold"),
        *("buy sell", "front back", "he she", "black blue brown", "red green grey gray", "cat car bat hat rat"),
        *("horse house mouse", "boat goat coat", "king ring", "cosine sine", "accept except", "odd even", "dog fog"),
    )
]
_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july", "august", "september", "october"),
    *("november", "december"),
)
_OPPOSITE = ("un", "in", "im", "il", "ir", "dis", "non", "non-", "a", "fe", "anti", "de", "mis", "sub", "super", "re")
_OPPOSITE_PARTS = (("^hyper", "hypo"), ("^endo", "exo"), ("(?:er|or)$", "ee"))
_ORDINALS = {
    "first": "1st", "second": "2nd", "third": "3rd", "fourth": "4th", "fifth": "5th", "sixth": "6th", "seventh": "7th",
    "eighth": "8th", "ninth": "9th", "tenth": "10th", "eleventh": "11th", "twelfth": "12th",
}  # fmt: skip
_MOST_CASED = 4  # letters of a word whose case may have a meaning
_EXTRA = 2  # words beside those of the truth that make an answer a sentence around it; "dark red" is another colour
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
    if len(one) > _MOST_CASED or _YES.fullmatch(word) or _NO.fullmatch(word) or word in ("am", "pm"):
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
    head = _HEAD.fullmatch(text)
    return head is not None and plain_text(truth) == head["head"] and not _contradicts(head["head"], head["rest"])


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
    meant = _same_meaning(readings[0], truth)
    if meant is not None:
        is_homograph = plain_text(truth) in HOMOGRAPHS or plain_text(readings[0]) in HOMOGRAPHS - NUMBERS.keys()
        return None if meant and is_homograph else meant
    dates = _date(readings[0]), _date(truth)
    if all(dates):
        return dates[0] == dates[1]
    if any(_is_other_form(reading, truth) or _is_same_number(reading, truth) for reading in readings):
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
    likeness = max(_likeness(reading, truth) for reading in readings)
    counts = {len(text.split()) for text in (truth, readings[0])}
    if likeness >= (_WORD_THRESHOLD if len(counts) == 1 or 1 in counts else ANLS_THRESHOLD):
        return True
    return None if likeness >= ANLS_THRESHOLD or _holds_truth(readings[-1], truth) else False


def _is_made_of_parts(truth: str) -> bool:
    return read_structure(truth) is not None or ("\\" in truth and is_expression(truth))


def _first_verdict(readings: Sequence[str], truth: str) -> bool | None:
    return next((verdict for reading in readings if (verdict := same_value(reading, truth)) is not None), None)


def _contradicts(head: str, rest: str) -> bool:
    """Return whether what follows "yes," or "no," says the other thing."""
    other = _NO if _YES.fullmatch(head) else _YES
    return bool({"yes", "no", "not"} & set(words_of(rest)) - ({"no", "not"} if head == "no" else set())) or (
        other.match(rest) is not None and rest != head
    )


def _same_meaning(answer: str, truth: str) -> bool | None:
    """Compare yes and no, numbers and colours across languages; None if one of them is no such word."""
    one, other = plain_text(answer), plain_text(truth)
    head = _HEAD.fullmatch(one)
    one = head["head"] if head and not _contradicts(head["head"], head["rest"]) else one
    meanings = []
    for text in (one, other):
        yes, no = _YES.fullmatch(text), _NO.fullmatch(text)
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


def _date(text: str) -> tuple[int, int, int] | None:
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


def _is_other_form(answer: str, truth: str) -> bool:
    """Return whether two texts may be one thing: words in another order, an abbreviation, a date written otherwise."""
    ones, others = words_of(answer), words_of(truth)
    longer, shorter = sorted((ones, others), key=len, reverse=True)
    extra = [word for word in longer if word not in shorter]
    if (
        shorter
        and min(map(len, extra), default=0) > 1
        and len(longer) - len(extra) == len(shorter)
        and all(map(_LITTLE.fullmatch, extra))
    ):
        return True  # "to the right"
    if len(ones) == len(others) and all(
        one.rstrip("s") == other.rstrip("s") for one, other in zip(ones, others, strict=True)
    ):
        return True  # "dogs"
    hours = [
        re.fullmatch(r"(\d{1,2})(?::00)?\s*(?:a\.?m\.?|p\.?m\.?|o'?clock)?", plain_text(text))
        for text in (answer, truth)
    ]
    if hours[0] and hours[1] and hours[0][1] == hours[1][1] and not (answer + truth).strip().isdigit():
        return True
    figures = [re.findall(r"\d+", text) for text in (answer, truth)]
    if len(figures[0]) > 1 and figures[0] == figures[1]:
        return True
    if len(ones) > 1 and sorted(ones) == sorted(others):
        return True
    if set(re.findall(r"\b\d{4}\b", answer)) & set(re.findall(r"\b\d{4}\b", truth)):
        return True
    if "." not in answer + truth and not (answer.isupper() or truth.isupper()):
        return False
    for short, long in ((answer, truth), (truth, answer)):
        initials = "".join(word[0] for word in re.findall(r"\w+", long) if word[0].isupper())
        if len(initials) > 1 and re.sub(r"[\W_]", "", short).upper() == initials:
            return True
    parts = [re.findall(r"\w+", text.lower()) for text in (answer, truth)]
    return len(parts[0]) == len(parts[1]) > 1 and all(map(_may_abbreviate, *parts))


def _is_same_number(answer: str, truth: str) -> bool:
    """Return whether two texts are one number in two forms, ``10²`` and 100; 5 and 5 % are not."""
    if not re.search(r"\d", truth) or ("%" in plain(answer)) != ("%" in plain(truth)):
        return False
    return same_value(answer, truth) is True


def _may_abbreviate(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    letters = iter(long)
    return one == other or (short[0] == long[0] and len(short) <= 4 and all(letter in letters for letter in short))


def _holds_truth(answer: str, truth: str) -> bool:
    """Return whether an answer says more than the truth, "the colour blue", without denying or listing it."""
    said, right = plain_text(answer), words_of(truth)
    if (
        not right
        or _DENIAL.search(said)
        or re.search(rf"{words('both')}|,", said)
        or (_same_meaning(truth, truth) and len(right) == 1 and (_YES.fullmatch(right[0]) or _NO.fullmatch(right[0])))
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


def _likeness(answer: str, truth: str) -> float:
    """Return how alike two texts are, from 0 to 1; of lists and texts of as many words, their most unlike parts."""
    one, other = plain_text(answer), plain_text(truth)
    for separator in (r"\s*[,;]\s*", r"\s+"):
        ones, others = re.split(separator, one), re.split(separator, other)
        if len(ones) != len(others) and "," in separator:
            return 0
        if len(ones) > 1 and len(ones) == len(others):
            return min(map(_likeness, ones, others))
    numbers = [re.findall(r"\d+|[\^√/*=<>±!+]", text) for text in (one, other)]
    denials = [_DENIAL.search(text) is None for text in (one, other)]
    if numbers[0] != numbers[1] or denials[0] != denials[1] or _are_unlike(one, other):
        return 0
    longer = max(len(one), len(other))
    if abs(len(one) - len(other)) > (1 - ANLS_THRESHOLD) * longer:  # the distance is at least that; spares long texts
        return 0
    return 1 - _levenshtein(one, other) / longer


def _are_unlike(one: str, other: str) -> bool:
    """Return whether the words in which two texts differ are others of one kind, or opposites."""
    ones, others = set(re.findall(r"\w+", one)), set(re.findall(r"\w+", other))
    for a in ones - others:
        for b in others - ones:
            if (
                len(a) == len(b) == 1
                or any({a, b} <= group for group in _UNLIKE)
                or any(a == p + b or b == p + a for p in _OPPOSITE)
                or any(re.sub(p, q, a) == b or re.sub(p, q, b) == a for p, q in _OPPOSITE_PARTS)
            ):
                return True
    return COLOURS.get(one, -1) != COLOURS.get(other, -1) and one in COLOURS and other in COLOURS


def _levenshtein(one: str, other: str) -> int:
    """Return how many characters must be inserted, deleted or replaced to turn one text into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
