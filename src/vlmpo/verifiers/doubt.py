"""One rule for every verifier: an answer that is taken back or left open, or a remark about it, is no answer."""

from __future__ import annotations

import re

from vlmpo.verifiers.characters import same_length
from vlmpo.verifiers.languages import EAST_ASIAN, LETTERS, UNKNOWN_SCRIPT, words
from vlmpo.verifiers.vocabulary import COLOURS, OTHER_LANGUAGES

# "Without doubt" is none.
_CERTAIN = re.compile(
    r"\b(?:without|no|beyond|sin|sem|sans aucun|ohne|без)\s+(?:any\s+|a\s+|all\s+|ninguna\s+|jeden\s+)?"
    r"(?:reasonable\s+)?(?:doubts?|dudas?|dúvidas?|doute|zweifel|сомнени\w+|question)\b|\bnot\s+only\b|毫无疑问|毫無疑問|間違いな[くい]"
)
_HEDGE = re.compile(words("hedge"))
_DOUBT = re.compile(words("retraction", "hedge", "opinion"))
_YES_OR_NO = re.compile(rf"\W*{words('yes', 'no')}")
# "No," or "No -" takes back what stands before it; "no other bars" does not.
_NO = re.compile(
    rf"(?<![{LETTERS}])(?:no|non|não|нет|nope|nein)\s*(?:[,.!;:…—–]|-\s|(?<=[.!?,;]\s\w\w)$"
    r"|\s(?:wait|sorry|it's|it is|that's|espera|perdón|digo|actually|make|sino|é|es|это|подожди)\b)"
)
_OTHERWISE = re.compile(rf"(?:^|[.!?;,(\n…—–])\s*{words('alternative', 'but')}")
_ALTERNATIVE = re.compile(rf"(?<=[^\s,(])[\s,(]*{words('alternative')}")
_CONDITION = re.compile(words("condition", "but"))
_NEGATED_CONDITION = re.compile(
    rf"{words('but')}\s*(?:not|no|não|pas|nicht|не|不是)|rather\s+than|instead\s+of|yet\s+to|even\s+(?:if|though)"
)
_REMARK = re.compile(words("remark"))
_QUESTION = re.compile(r"\?\s*(?:$|\n|[^\s?])")
_CLOSING = re.compile(words("closing"))
_HEADED = re.compile(rf"[\W_]*{words('closing')}[*_]*\s*:")
_VALUE = re.compile(
    rf"(?<![{LETTERS}.])(?:[A-J]|\d[\d.,]*)(?![{LETTERS}])|\b(?:one|two|three|four|five|six|seven|eight|nine|ten)\b"
)
_IT_IS = re.compile(r"(?:it(?:'s| is)|this is|that is|that's|es|c'est|es ist|das ist|это|é|是|应为)\s")
_MOST_WORDS = 4  # of a later sentence that states another answer; longer ones explain
_SENTENCES = re.compile(r"[.!?;]\s+|[\n。!?]")
_FAULT, _OTHERS = re.compile(words("fault")), re.compile(words("others"))
_NOT_IT = re.compile(rf"{words('denial', 'contrast', 'fault')}|n't\b|\btoo\s\w")
_THIS = re.compile(r"\W*(?:this|that|it|the\s+above|there|my|i)\b")
_EXCLAMATION = re.compile(r"^\W*\w+,\s")  # "False, it is C."
_ONE_LETTER = re.compile(
    r"\W*(?:(?:option|choice)\s+)?\(?([A-J])\)?\W*(?:(?<=,)\s+[a-z].*|(?<=[.:)–—-])\s+.*)?", re.DOTALL
)
# Letters that may be options: not of figures ("angle B", "group C"), nor the articles "A" and "a".
_OPTION_LETTER = re.compile(
    rf"(?<![{LETTERS}'.])(?<!\\)(?:(?P<named>angle|point|side|line|triangle|vertex|circle|student|set|figure|node|=)\s+)?"
    rf"\(?(?P<letter>A(?!\s+[a-z]+\s+[a-z])|I(?!\s+[a-z])|[B-HJ])(?![{LETTERS}'])"
)
_CONCLUDES = re.compile(
    r"(?<!\w)(?:so|thus|therefore|hence|which makes it|making|donc|daher|folglich|portanto|por (?:lo )?tanto|поэтому"
    r"|следовательно)(?!\w)|所以|因此|故|よって|したがって"
)
_RESULT = re.compile(r"=\s*[$\\(]*(-?\d[\d.,]*\d|\d)(?![\d.]*\s*[-+*/×^=\d])")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_KNOWN_WORD = re.compile(words("sentence", "article", "be", "both", "copula", "reason"))


def is_doubtful(text: str) -> bool:
    """Return whether ``text``, an answer with what stands beside it, takes it back or leaves it open."""
    lower = _lower(text)
    yes_or_no = _YES_OR_NO.match(lower)
    head = yes_or_no or re.match(r"\W*\w+", lower)
    after = lower[head.end() :] if head else lower
    start = yes_or_no.end() if yes_or_no else 0  # a "nein" that is the answer takes nothing back
    if any(doubt.end() > start for doubt in _DOUBT.finditer(lower)):
        return True
    return bool(_NO.search(after) or _OTHERWISE.search(after) or "?" in after)


def is_hedged(before: str) -> bool:
    r"""Return whether the sentence that leads up to an answer leaves it open: "It could be \boxed{3}"."""
    return _HEDGE.search(_lower(re.split(r"[.!?;]\s|[\n。!?]", same_length(before))[-1])) is not None


def is_alternative(text: str) -> bool:
    """Return whether ``text``, an answer without explanation, names several or limits itself: "3 or 4", "3 if red"."""
    lower = _lower(text)
    return bool(_ALTERNATIVE.search(lower) or _CONDITION.search(_NEGATED_CONDITION.sub(" ", lower)))


def is_taken_back(after: str, answer: str) -> bool:
    """Return whether the rest of a response, ``after`` its answer, takes the answer back or states another one."""
    lower = _lower(after)
    if any(pattern.search(lower) for pattern in (_DOUBT, _NO, _OTHERWISE, _QUESTION)):
        return True
    known = set(re.findall(r"\w+", _lower(answer)))
    sentences = _SENTENCES.split(same_length(after))[1:]
    return any(_states_another(sentence, known) for sentence in sentences) or contradicts("\n".join(sentences), answer)


def contradicts(said: str, answer: str) -> bool:
    """Return whether what is ``said`` beside an answer calls it wrong, or comes to another one of its kind."""
    shape, numbers = same_length(said), set(_NUMBER.findall(same_length(answer)))
    letter = _ONE_LETTER.fullmatch(same_length(answer))
    is_yes_or_no = _YES_OR_NO.match(_lower(answer)) is not None
    for sentence in filter(None, _SENTENCES.split(shape)):
        lower, concluded = _lower(sentence), _CONCLUDES.split(sentence.lower())[1:]
        others = {found["letter"] for found in _OPTION_LETTER.finditer(sentence) if not found["named"]}
        others -= {letter[1]} if letter else set()
        if letter and others and not _NOT_IT.search(_EXCLAMATION.sub("", lower)):
            return True
        if _FAULT.search(lower) and not (is_yes_or_no or _OTHERS.search(lower) or (others and not _THIS.match(lower))):
            return True
        if concluded and _is_other_colour(concluded[-1], answer):
            return True
        found = _NUMBER.findall(sentence)
        if numbers and concluded and (last := _NUMBER.findall(concluded[-1])) and last[-1] not in numbers:
            return True
        if found and found[-1] not in numbers and _is_unread(sentence):
            return True
    results = _RESULT.findall(shape)
    is_negative = "-" in same_length(answer).replace("−", "-")
    return len(numbers) == 1 and bool(results) and results[-1] not in {f"{'-' * is_negative}{one}" for one in numbers}


def _is_other_colour(concluded: str, answer: str) -> bool:
    """Return whether "so purple" follows the answer "blue"."""
    right, found = ({COLOURS.get(word) for word in re.findall(r"\w+", _lower(text))} for text in (answer, concluded))
    return bool(right - {None} and found - right - {None})


def is_remark(text: str) -> bool:
    """Return whether ``text`` speaks about the answer instead of giving it: "clear from the chart", "I need to ..."."""
    return _REMARK.match(_lower(text).strip(" *_`.!\"'")) is not None


def _is_unread(sentence: str) -> bool:
    """Return whether a sentence is in no language that is read."""
    if any(map(str.isalpha, UNKNOWN_SCRIPT.findall(sentence))) or OTHER_LANGUAGES & set(_lower(sentence).split()):
        return True
    is_long = len(re.findall(r"[^\W\d_]{2,}", sentence)) > _MOST_WORDS
    return is_long and not re.search(f"[{EAST_ASIAN}]", sentence) and len(_KNOWN_WORD.findall(_lower(sentence))) < 2


def is_filler(text: str) -> bool:
    """Return whether ``text`` is a word said beside an answer, not one: "Okay.", "Thanks!"."""
    return _CLOSING.fullmatch(_lower(text).strip(" .!")) is not None


def _states_another(sentence: str, known: set[str]) -> bool:
    """Return whether a short later sentence, such as "It is 4" or "Blue", says something else than the answer."""
    said = re.sub(r"\\[A-Za-z]+|</?\w+>|[^\w\s'.,]", " ", sentence).strip(" .,")
    parts = re.findall(rf"[{LETTERS}]+(?:'\w+)?|\w", said.lower())
    if not parts or len(parts) > _MOST_WORDS or set(parts) <= known or is_filler(said):
        return False
    if len(parts) == 1 and (len(parts[0]) > 15 or parts[0] in ("a", "i")):
        return False
    values = [value.lower().strip(".,") for value in _VALUE.findall(said)]
    if _HEADED.match(sentence.lower()) or (values and values[-1] in known):  # "Reason: ...", "3 + 4 = 7"
        return False
    return len(parts) <= 2 or bool(values) or (len(parts) == 3 and _IT_IS.match(said.lower()) is not None)


def _lower(text: str) -> str:
    return _CERTAIN.sub(" ", same_length(text).lower().replace("、", ",").replace("。", "."))
