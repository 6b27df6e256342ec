r"""Finds the final answer of a response, without guessing.

In this order:

1. The last of these marks: a "Final answer: ..." line (also "the final answer is ..."), ``\boxed{...}``,
   ``<answer>...</answer>``. If the last one is cut off, empty or denied, there is no final answer: an earlier mark is
   not used instead.
2. Without such a mark, the last plain statement of an answer: "Answer: B", "答案是3", "option C is correct". One that
   only speaks about the answer ("the answer is clear from the chart") is passed over.
3. Without that either, a response that is nothing but an answer: one short line, no sentence.

An answer that the rest of the response takes back, or leaves open, is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vlmpo.verifiers.characters import braced, same_length
from vlmpo.verifiers.doubt import is_alternative, is_doubtful, is_filler, is_hedged, is_remark, is_taken_back
from vlmpo.verifiers.units import UNITS
from vlmpo.verifiers.languages import LANGUAGES, LETTERS, UNSPACED, words

_EMPHASIS = "*_`#"
_SPACE = r"[*_`\"' \t]*"


def _announcement(code: str) -> str:
    """Return the pattern of "the answer is" in a language: with a verb, with a colon, or alone on its line."""
    language = LANGUAGES[code]
    answer, verb = (part.replace(" ", r"[ \t]+") for part in (language.answer, language.verb))
    heading = rf"(?m:^)[#*_ \t]*(?:{answer}){_SPACE}(?=\n)"
    if code in UNSPACED:
        return rf"{heading}|(?:{answer}){_SPACE}(?:(?:{verb})[、:]?|[:=】]|\]:?)"
    is_verb = rf"[ \t]+(?:{verb})(?![{LETTERS}'])[ \t]*:?"
    return rf"{heading}|(?<![{LETTERS}])(?:{answer}){_SPACE}(?:{is_verb}|[ \t]*[:=]|[ \t]+[—–][ \t])"


_STATED = re.compile("|".join(f"(?P<{code}>{_announcement(code)})" for code in LANGUAGES), re.IGNORECASE)
_TO_ANSWER = re.compile(r"[*_`\"' \t]*\n*[*_` \t]*")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_FINAL = re.compile(words("final"), re.IGNORECASE)
_LABEL = r"(?:(?i:(?:" + words("option") + r"))\s*\(?(?P<{0}1>[A-Za-z])\)?|\((?P<{0}2>[A-Za-z])\)|(?<![" + LETTERS + r"'])(?P<{0}3>[A-J]))"
_OPTION_IS = re.compile(
    _LABEL.format("a") + rf"[*_`]*(?:(?:项|选项)?是|[はが]|\s+(?:is|seems|appears|es|est|ist|é|—|–|это)(?![{LETTERS}]))\s*(?:to\s+be\s+)?(?:the\s+)?(?:most\s+\w+\s+)?"
    + f"(?i:{words('correct')})"
)
_OPTION_TAKEN = re.compile(
    r"(?:\b(?i:choose|chose|select|pick|go\s+with)\s+(?:the\s+)?|(?<![不没別别可])(?:选择|选|選擇|選)(?![项項])\s*:?\s*)"
    + _LABEL.format("b") + rf"(?![{LETTERS}'])"
)
_NEGATED = re.compile(rf"\s*(?:{words('denial')})", re.IGNORECASE)
_NEGATED_END = re.compile(r"(?:ではありません|ではない|じゃない|でない|ではなく|じゃありません)")
# Words that, before a statement, make it none.
_SUPPOSED = re.compile(
    rf"(?:{words('supposed')}|n't)(?:\s+(?:that|the|my|an?|say|to|correct|right|best|la|le|el|die|der|a|o|正确|正しい))*\s*$",
    re.IGNORECASE,
)
_ADVERB = re.compile(rf"\s*(?:{words('adverb')})[\s,]+", re.IGNORECASE)
_ENDING = re.compile(rf"(?<=\S)(?:{words('ending')})(?:[。.!!]?\s*)$")
# A full stop after these does not end a sentence, nor one after a single letter ("C. The red one", "John F. K.").
_TITLES = frozenset(
    "dr mr mrs ms st prof no vs jr sr approx ca fig inc co nr z.b d.h bzw sra mme mlle ул г см".split()
)
_STOP = re.compile(r"[.!?](?=\s+[\"'(¿¡]*[A-ZÀ-ÖØ-ÞА-ЯЁ\u3040-\u30ff\u4e00-\u9fff])|[。!?](?=\S)(?<=[。!?])")
_BARE_LABEL = re.compile(
    rf"(?:(?:{words('option')})\s*\(?[A-Za-z]\)?[.:]?$|\([A-Za-z]\)|[A-Za-z]\)|[A-Z][.:](?:\s|$))", re.IGNORECASE
)
_EAST_ASIAN = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
_COPULA = re.compile(rf"{words('copula')}\s*:?\s*(?P<rest>.+)", re.IGNORECASE)
_VERB = re.compile(rf"(?<![{LETTERS}])(?:is|are|was|were|it's|that's|he's|she's|es|son|está|están|est|sont|ist|sind|é|são|estão|это|has|have)(?![{LETTERS}])|c'est|[是为為は]|[—–]|\s-\s", re.IGNORECASE)
_DENIED_SUBJECT = re.compile(
    rf"(?<![{LETTERS}])(?:not|no|none|never|neither|nor|if|whether|não|nunca|ne|n'|nicht|keine?r?|nie|не|ни|si|se|wenn|если|que|that|which|who)(?![{LETTERS}])"
    "|n't|n'|[不没非如若]|ない|でも", re.IGNORECASE
)
_YES_OR_NO = re.compile(f"(?:{words('yes')}|{words('no')})[.。!]?", re.IGNORECASE)
_SENTENCE = re.compile(words("sentence"), re.IGNORECASE)
_BARE_WORDS, _BARE_CHARACTERS, _BARE_SIGNS = 12, 120, 12
_LONGEST = 1000  # characters of a final answer; a longer one is a story, and slow to parse
_MOST_MARKS = 20  # that are looked at, from the end
_UNIT_AFTER = re.compile(
    rf"\$?(?:\\\))?\s?((?:\\%|%|°[CF]?|{'|'.join(sorted(filter(str.isalpha, UNITS), key=len, reverse=True))})[²³]?)(?![{LETTERS}^])"
)
# What makes a box a part of a larger formula, before it and after it. `- \\boxed{3}` on a line of its own is a list.
_LEADS_IN = re.compile(
    r"(?:(?<![A-Za-z])[A-Za-z]|[\d)}\]])$|[\w)}] ?[+\-−/^±×] ?\$?$|[\w)}] \* $|(?:^|[=$(:\s])[-−+±√]\$?$|\\[a-z]+\s?$"
)
_LEADS_ON = re.compile(
    r"[A-Za-z0-9(^!/+²³_{−-]|\*\s?\d|\\(?![)\]%,;]|text|quad|\n)|\s?\$?\s?(?:[+/×^−]|-\s?\d)"
    rf"|[\s$]*(?:{words('both')})\s*[\\\d$A-J]"
)
_BETWEEN_BOXES = re.compile(rf"[\s$,;.&*]*(?:{words('alternative')}|{words('both')})?[\s$,;.&*]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """Holds an answer as the response gives it.

    Attributes:
        text: without emphasis and a surrounding ``$``.
        language: of the words that announce it; "" if none do.
        is_sentence: whether it is taken from a sentence that nothing announces, "The car is red.": if it is the truth
            the sentence says so, but if not, the question may have been another one.
        is_remark: whether it speaks about the answer, "clear from the chart"; then it is none, unless it is the truth.
    """

    text: str
    language: str = ""
    is_sentence: bool = False
    is_remark: bool = False


@dataclass(frozen=True, slots=True)
class _Mark:
    """Holds where an answer is announced: its text (None: cut off or denied), and where that begins and ends."""

    text: str | None
    start: int
    end: int
    is_strong: bool
    language: str = ""
    is_remark: bool = False


def parse_final_answer(text: str) -> str | None:
    """Return the final answer in the response's words, without emphasis and a surrounding ``$``.

    The last of several answers counts. A reasoning block (``<think>...</think>``) is not part of the response; after
    one that is never closed there is no response.

    Args:
        text: a whole response.

    Returns:
        The answer's text, on one line unless boxed; None if no final answer can be read.
    """
    found = find_final_answer(text)
    return None if found is None or found.is_remark else found.text


def find_final_answer(text: str) -> FinalAnswer | None:
    """Return the final answer as :func:`parse_final_answer` reads it, with the language that announces it."""
    text = text.replace("\r\n", "\n")
    _, closed, after = text.rpartition("</think>")
    text = after if closed else text.partition("<think>")[0]
    shape = same_length(text)
    marks = sorted(_matches(shape), key=lambda mark: mark.start())[-_MOST_MARKS:]
    if not marks:
        return _bare(text)
    chosen = _decisive(shape, [_read_mark(text, shape, match) for match in marks])
    if chosen is None or chosen.text is None or is_taken_back(text[chosen.end :], chosen.text):
        return None
    if is_hedged(text[max(0, chosen.start - 200) : chosen.start]):
        return None
    answer = tidy(chosen.text)
    if not answer or len(chosen.text) > _LONGEST:
        return None
    return FinalAnswer(answer, chosen.language, is_remark=chosen.is_remark)


def tidy(text: str) -> str:
    """Strip white space, emphasis, ``$...$`` and a full stop around ``text``, unless nothing else is left."""
    whole = text.strip()
    text = whole.strip(_EMPHASIS + " \t")
    text = re.sub(r"(?<![.。])[.。．]$", "", text).rstrip(_EMPHASIS + " \t")
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner.strip() and opening not in inner:
            text = inner.strip()
    return text or whole


def first_sentence(text: str) -> str:
    """Return ``text`` up to the first end of a sentence: ``。``, or a full stop, ``!`` or ``?`` before a capital."""
    for stop in _STOP.finditer(text):
        before = re.search(r"([\w.]+)\W*$", text[max(0, stop.start() - 40) : stop.start()])
        word = before.group(1).lower() if before and stop.group() in "." else ""
        if not (word in _TITLES or (len(word) == 1 and word.isalpha())):
            return text[: stop.start()]
    return text


def is_sentence(text: str) -> bool:
    """Return whether ``text`` has words of a sentence, or more of them than a short answer."""
    shape = same_length(text).replace("’", "'")
    spaced = len(shape.split()) > _BARE_WORDS
    return spaced or len(_EAST_ASIAN.findall(shape)) > _BARE_SIGNS or bool(_SENTENCE.search(shape))


def _matches(shape: str) -> Iterator[re.Match[str]]:
    for pattern in (_STATED, _BOXED, _TAG, _OPTION_IS, _OPTION_TAKEN):
        yield from pattern.finditer(shape)


def _read_mark(text: str, shape: str, match: re.Match[str]) -> _Mark:
    """Return the answer that a mark announces."""
    if match.re is _BOXED:
        return _boxed(text, match)
    if match.re is _TAG:
        content, closed, _ = text[match.end() :].partition("</answer>")
        return _Mark(content if closed else None, match.start(), match.end() + len(content) + 9, is_strong=True)
    if match.re is not _STATED:
        letter = next(group for group in match.groups() if group)
        supposed = _is_supposed(shape, match.start())
        return _Mark(None if supposed else letter, match.start(), match.end(), is_strong=False, language="en")
    return _stated(text, shape, match)


def _stated(text: str, shape: str, match: re.Match[str]) -> _Mark:
    language = match.lastgroup or ""
    is_strong = _FINAL.search(match.group()) is not None
    spacing = _TO_ANSWER.match(shape, match.end())
    start = spacing.end() if spacing else match.end()
    line_end = shape.find("\n", start)
    line = text[start : line_end if line_end >= 0 else len(text)]
    adverb = _ADVERB.match(same_length(line))
    if adverb and not is_remark(line):
        start, line = start + adverb.end(), line[adverb.end() :]
    has_verb = not match.group().rstrip("*_`\"' \t").endswith((":", "="))
    if _is_supposed(shape, match.start()) or _is_denied(line, has_verb=has_verb):
        return _Mark(None, match.start(), start, is_strong, language)
    sentence = first_sentence(line)
    remark = is_remark(sentence) and (" " in sentence.strip() or _EAST_ASIAN.search(sentence) is not None)
    if language in UNSPACED:
        content = _ENDING.sub("", sentence.strip())
    else:
        content = line if is_strong else sentence
    end = start + len(line if content is line else sentence)
    return _Mark(content, match.start(), end, is_strong, language, remark)


def _is_denied(line: str, *, has_verb: bool) -> bool:
    """Return whether a verb is followed by a denial: "is not 3"; "Answer: not 3" is an answer, if a poor one."""
    shape = same_length(line)
    return (has_verb and _NEGATED.match(shape) is not None) or _NEGATED_END.search(first_sentence(shape)) is not None


def _boxed(text: str, match: re.Match[str]) -> _Mark:
    """Read a box, together with the boxes just before it: ``\\boxed{A}, \\boxed{C}``."""
    content = braced(text, match.end())
    end = match.end() + len(content or "") + 1
    if content is None or _is_part(text, match.start(), end):
        return _Mark(None, match.start(), end, is_strong=True)
    start, parts = match.start(), content
    for earlier in reversed(list(_BOXED.finditer(text, max(0, start - 200), start))):
        inner = braced(text, earlier.end())
        if inner is None:
            break
        between = text[earlier.end() + len(inner) + 1 : start]
        if not _BETWEEN_BOXES.fullmatch(same_length(between)) or (inner == parts and not between.strip(" \n$,;.&*")):
            break
        start, parts = earlier.start(), f"{inner}{between.replace('$', '') or ' '}{parts}"
    unit = _UNIT_AFTER.match(text, end)
    if unit and parts == content:
        parts, end = f"{parts} {unit[1]}", unit.end()
    return _Mark(parts, start, end, is_strong=True)


def _is_part(text: str, start: int, end: int) -> bool:
    """Return whether a box is part of a larger formula: ``-\\boxed{3}``, ``\\boxed{3}^2``, ``\\boxed{3} and 4``."""
    before, after = text[max(0, start - 10) : start], text[end : end + 30]
    return _LEADS_IN.search(before) is not None or _LEADS_ON.match(same_length(after)) is not None


def _decisive(shape: str, marks: list[_Mark]) -> _Mark | None:
    """Return the last strong mark, or the last one if there is none; None if a later statement contradicts it.

    Remarks are passed over, unless there is nothing else.
    """
    marks = [mark for mark in marks if not mark.is_remark] or marks
    strong = next((mark for mark in reversed(marks) if mark.is_strong), None)
    if strong is None:
        return marks[-1]
    later = [mark for mark in marks if mark.start >= strong.end]
    if strong.text is None or not later:
        return strong
    if any(mark.text is None for mark in later):
        return None
    if all(tidy(mark.text or "").lower() == tidy(strong.text).lower() for mark in later):
        return strong
    return later[-1] if is_taken_back(shape[strong.end : later[-1].start + 12], strong.text) else None


def _is_supposed(text: str, start: int) -> bool:
    """Return whether the words before ``start`` make what follows no statement: "if the answer is 3"."""
    return _SUPPOSED.search(text[max(0, start - 60) : start]) is not None


def _bare(text: str) -> FinalAnswer | None:
    line = text.strip()
    if not line or "\n" in line or len(line) > _BARE_CHARACTERS:
        return None
    shape = same_length(line)
    is_label = _BARE_LABEL.match(shape.strip(_EMPHASIS)) is not None
    if is_label or _YES_OR_NO.fullmatch(shape) or not (is_sentence(line) or first_sentence(line) != line):
        # Russian sentences need no verb: "Машина красная."
        sentence = re.fullmatch(r"[А-ЯЁ].*\s.*[.]", line) is not None
        return FinalAnswer(tidy(line), is_sentence=sentence, is_remark=is_filler(line))
    return _statement(line)


def said_of_subject(text: str) -> str | None:
    """Return ``red`` of "The car is red.": what a plain sentence says of its subject; None if it is no such sentence."""
    shape = same_length(text)
    copula = _COPULA.fullmatch(shape)
    if copula is None:
        return None
    start = copula.start("rest")
    subject, rest = shape[:start], _ENDING.sub("", shape[start:])
    is_plain = len(_VERB.findall(subject)) == 1 and not _DENIED_SUBJECT.search(subject) and not _NEGATED_END.search(rest)
    return text[start : start + len(rest)] if is_plain else None


def _statement(line: str) -> FinalAnswer | None:
    """Return what a bare sentence such as "The car is red." says of its subject, if that is short and plain."""
    rest = None if is_doubtful(line) else said_of_subject(tidy(line))
    if not rest or is_sentence(rest) or is_remark(rest) or is_alternative(f"x {rest}") or _NEGATED.match(rest):
        return None
    return FinalAnswer(tidy(rest), is_sentence=True) if len(rest.split()) <= 4 else None
