"""One rule for every verifier: an answer that is taken back or left open, or a remark about it, is no answer."""

from __future__ import annotations

import re

from vlmpo.verifiers.characters import same_length
from vlmpo.verifiers.languages import LETTERS, words

_CERTAIN = re.compile(
    r"\b(?:without|no|beyond|sin|sem|sans aucun|sans l'ombre d'un|ohne|без)\s+(?:any\s+|a\s+|all\s+|ninguna\s+|jeden\s+)?"
    r"(?:reasonable\s+)?(?:doubts?|dudas?|dúvidas?|doute|zweifel|сомнени\w+|question)\b|\bnot\s+only\b|毫无疑问|毫無疑問|间違いなく|間違いな[くい]"
)
_RETRACTION = re.compile(words("retraction"))
_HEDGE = re.compile(words("hedge"))
_DOUBT = re.compile(f"{_RETRACTION.pattern}|{_HEDGE.pattern}|{words('opinion')}")
_YES_OR_NO = re.compile(f"\\W*(?:{words('yes')}|{words('no')})")
# "No," or "No -" takes back what stands before it; "no other bars" does not.
_NO = re.compile(
    rf"(?<![{LETTERS}])(?:no|non|não|нет|nope|nein)\s*(?:[,.!;:…—–]|-\s|\.\.\.|(?<=[.!?,;]\s\w\w)$|\s(?:wait|sorry|it's|it is|that's|espera|perdón|digo|"
    r"actually|make|sino|é|es|это|подожди)\b)"
)
_OTHERWISE = re.compile(rf"(?:^|[.!?;,(\n…—–])\s*(?:{words('alternative')}|but|however|pero|mas|porém|mais|aber|но|однако|但|不过|しかし|でも)(?![{LETTERS}])")
_ALTERNATIVE = re.compile(rf"(?<=[^\s,(])[\s,(]*{words('alternative')}")
_CONDITION = re.compile(words("condition"))
_NEGATED_CONDITION = re.compile(r"(?:but|pero|mas|mais|aber|но|但)\s+(?:not|no|não|pas|nicht|не|不是)|rather\s+than|instead\s+of|yet\s+to|even\s+(?:if|though)")
_REMARK = re.compile(rf"(?:{words('remark')})", re.DOTALL)
_QUESTION = re.compile(r"\?\s*(?:$|\n|[^\s?])|^\W{0,2}\?")
# Sentences of a word or two that close a response.
_CLOSING = re.compile(
    r"thank\w*|thank you|thanks .*|done|q\.?e\.?d|end|cheers|good luck|hope (?:this|that|it) helps|i hope .*|\W*|ok|okay|great|sure|alright|well|enjoy|gracias|merci"
    r"|danke|obrigad[oa]|спасибо|谢谢|ありがとう.*|以上.*|完毕|fin|fim|ende|конец|step \d+.*|figure \d+.*|see .*|source.*|explanation|reasoning|reason|note"
    r"|解释|解析|理由|説明|explicación|explication|erklärung|begründung|explicação|объяснение|пояснение"
)
_VALUE = re.compile(rf"(?<![{LETTERS}.])(?:[A-J]|\d[\d.,]*)(?![{LETTERS}])|\b(?:one|two|three|four|five|six|seven|eight|nine|ten)\b")
_IT_IS = re.compile(r"(?:it(?:'s| is)|this is|that is|that's|es|c'est|es ist|das ist|это|é|是|应为)\s")
_LONGEST_AFTER = 4  # words of a later sentence that states another answer; longer ones explain


def is_doubtful(text: str) -> bool:
    """Return whether ``text``, an answer with what stands beside it, takes it back or leaves it open."""
    lower = _lower(text)
    yes_or_no = _YES_OR_NO.match(lower)
    head = yes_or_no or re.match(r"\W*\w+", lower)
    after = lower[head.end() :] if head else lower
    return bool(_DOUBT.search(after if yes_or_no else lower) or _NO.search(after) or _OTHERWISE.search(after) or "?" in after)


def is_hedged(before: str) -> bool:
    """Return whether the sentence that leads up to an answer leaves it open: "It could be \\boxed{3}"."""
    return _HEDGE.search(_lower(re.split(r"[.!?;]\s|[\n。!?]", same_length(before))[-1])) is not None


def is_alternative(text: str) -> bool:
    """Return whether ``text``, an answer without explanation, names several or limits itself: "3 or 4", "3 if red"."""
    lower = _lower(text)
    return bool(_ALTERNATIVE.search(lower) or _CONDITION.search(_NEGATED_CONDITION.sub(" ", lower)))


def is_taken_back(after: str, answer: str) -> bool:
    """Return whether the rest of a response, ``after`` its answer, takes the answer back or states another one."""
    lower = _lower(after)
    if not lower.strip():
        return False
    if _DOUBT.search(lower) or _NO.search(lower) or _OTHERWISE.search(lower) or _QUESTION.search(lower):
        return True
    known = set(re.findall(r"\w+", _lower(answer)))
    return any(_states_another(sentence, known) for sentence in re.split(r"[.!?]\s+|[\n。!?]", same_length(after))[1:])


def is_remark(text: str) -> bool:
    """Return whether ``text`` speaks about the answer instead of giving it: "clear from the chart", "I need to ..."."""
    lower = _lower(text).strip(" *_`.!\"'")
    remark = _REMARK.match(lower)
    return remark is not None and len(lower) > 0


def is_filler(text: str) -> bool:
    """Return whether ``text`` is a word said beside an answer, not one: "Okay.", "Thanks!"."""
    return re.search(r"\w", text) is not None and _CLOSING.fullmatch(_lower(text).strip(" .!")) is not None


def _states_another(sentence: str, known: set[str]) -> bool:
    """Return whether a short later sentence, such as "It is 4" or "Blue", says something else than the answer."""
    said = re.sub(r"\\[A-Za-z]+|</?\w+>|[^\w\s'.,]", " ", sentence).strip(" .,")
    parts = re.findall(rf"[{LETTERS}]+(?:'\w+)?|\w", said.lower())
    if not parts or set(parts) <= known or _CLOSING.fullmatch(said.lower()):
        return False
    if len(parts) > _LONGEST_AFTER:
        return False
    if len(parts) == 1 and (len(parts[0]) > 15 or parts[0] in ("a", "i")):
        return False
    values = {value.lower().strip(".,") for value in _VALUE.findall(said)}
    return len(parts) <= 2 or bool(values - known) or _IT_IS.match(said.lower()) is not None


def _lower(text: str) -> str:
    return _CERTAIN.sub(" ", same_length(text).lower().replace("、", ",").replace("。", "."))
