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
from vlmpo.verifiers.languages import EAST_ASIAN, LANGUAGES, LETTERS, UNSPACED, words
from vlmpo.verifiers.sentences import (
    EMPHASIS,
    first_sentence,
    is_denied_after,
    is_sentence,
    said_of_subject,
    tidy,
    without_ending,
)
from vlmpo.verifiers.units import UNITS

_SPACE = r"[*_`\"' \t]*"


def _announcement(code: str) -> re.Pattern[str]:
    """Return the pattern of "the answer is" in a language: with a verb, with a colon, or alone on its line."""
    language = LANGUAGES[code]
    answer, verb = (part.replace(" ", r"[ \t]+") for part in (language.answer, language.verb))
    heading = rf"(?m:^)[#*_ \t]*(?:{answer}){_SPACE}(?=\n)"
    if code in UNSPACED:
        return re.compile(rf"{heading}|(?:{answer}){_SPACE}(?:(?:{verb})[、:]?|[:=】]|\]:?)")
    is_verb = rf"[ \t]+(?:{verb})(?![{LETTERS}'])[ \t]*:?"
    stated = rf"(?<![{LETTERS}])(?:{answer}){_SPACE}(?:{is_verb}|[ \t]*[:=]|[ \t]+[—–][ \t])"
    return re.compile(f"{heading}|{stated}", re.IGNORECASE)


_STATED = {code: _announcement(code) for code in LANGUAGES}
_NOUNS = {code: language.noun.split("|") for code, language in LANGUAGES.items()}
_TO_ANSWER = re.compile(r"[*_` \t]*\n*[*_` \t]*")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_FINAL = re.compile(words("final"), re.IGNORECASE)
_LABEL = (
    rf"(?:(?i:{words('option')})\s*\(?(?P<worded>[A-Za-z])\)?|\((?P<bracketed>[A-Za-z])\)"
    rf"|(?<![{LETTERS}'])(?P<plain>[A-J]))"
)
_OPTION_IS = re.compile(
    rf"{_LABEL}[*_`]*(?:(?:项|选项)?是|[はが]|\s+(?:seems|appears|{words('be')}))\s*"
    rf"(?:to\s+be\s+)?(?:the\s+)?(?:most\s+\w+\s+)?(?i:{words('correct')})"
)
_OPTION_TAKEN = re.compile(
    r"(?:\b(?i:choose|chose|select|pick|go\s+with)\s+(?:the\s+)?|(?<![不没別别可])(?:选择|选|選擇|選)(?![项項])\s*:?\s*)"
    rf"{_LABEL}(?![{LETTERS}'])"
)
_DENIED = re.compile(rf"\s*(?:{words('denial')})", re.IGNORECASE)
# Words that, before a statement, make it none: "if the answer is 3".
_SUPPOSED = re.compile(
    rf"(?:{words('supposed')}|n't)(?:\s+(?:that|the|my|an?|say|to|correct|right|best|la|le|el|die|der|a|o))*\s*$",
    re.IGNORECASE,
)
_ADVERB = re.compile(rf"\s*(?:{words('adverb')})[\s,]+", re.IGNORECASE)
_BARE_LABEL = re.compile(
    rf"(?:{words('option')}\s*\(?[A-Za-z]\)?[.:]?$|\([A-Za-z]\)|[A-Za-z]\)|[A-Z][.:](?:\s|$))", re.IGNORECASE
)
_YES_OR_NO = re.compile(f"{words('yes', 'no')}[.。!]?", re.IGNORECASE)
_REASONED = re.compile(rf"(?P<core>[^\s,.]+),?\s+{words('reason')}", re.IGNORECASE)  # "B, because it is tallest."
_NO_VERB = re.compile(r"[А-ЯЁ].*\s.*\.")  # Russian sentences need none: "Машина красная."
_MOST_BARE, _MOST_SAID = 120, 4  # characters of a bare answer; words that a bare sentence says of its subject
_LONGEST = 1000  # characters of a final answer; a longer one is a story, and slow to parse
_MOST_MARKS = 20  # that are looked at, from the end
_UNIT_NAMES = "|".join(sorted(filter(str.isalpha, UNITS), key=len, reverse=True))
_UNIT_AFTER = re.compile(rf"\$?(?:\\\))?\s?((?:\\%|%|°[CF]?|{_UNIT_NAMES})[²³]?)(?![{LETTERS}^])")
# What makes a box a part of a larger formula, before it and after it. `- \boxed{3}` on a line of its own is a list.
_LEADS_IN = re.compile(
    r"(?:(?<![A-Za-z])[A-Za-z]|[\d)}\]])$|[\w)}] ?[+\-−/^±×] ?\$?$|[\w)}] \* $|(?:^|[=$(:\s])[-−+±√]\$?$|\\[a-z]+\s?$"
)
_LEADS_ON = re.compile(
    r"[A-Za-z0-9(^!/+²³_{−-]|\*\s?\d|\\(?![)\]%,;]|text|quad|\n)|\s?\$?\s?(?:[+/×^−]|-\s?\d)"
    rf"|[\s$]*(?:{words('both')})\s*[\\\d$A-J]"
)
_BETWEEN_BOXES = re.compile(rf"[\s$,;.&*(]*(?:{words('alternative', 'both')})?[\s$,;.&*]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """Holds an answer as the response gives it.

    Attributes:
        text: without emphasis and a surrounding ``$``.
        is_sentence: whether it is taken from a sentence that nothing announces, "The car is red.": if it is the truth
            the sentence says so, but if not, the question may have been another one.
        is_remark: whether it speaks about the answer, "clear from the chart"; then it is none, unless it is the truth.
    """

    text: str
    is_sentence: bool = False
    is_remark: bool = False


@dataclass(frozen=True, slots=True)
class _Mark:
    """Holds where an answer is announced: its text (None: cut off or denied), and where that begins and ends."""

    text: str | None
    start: int
    end: int
    is_strong: bool
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
    """Return the final answer as :func:`parse_final_answer` reads it, with what the verifiers must know of it."""
    _, closed, after = text.replace("\r\n", "\n").rpartition("</think>")
    text = (after if closed else after.partition("<think>")[0]).strip()
    shape = same_length(text)
    marks = sorted(_matches(shape), key=lambda found: found[1].start())[-_MOST_MARKS:]
    if not marks:
        return _bare(text)
    chosen = _decisive(shape, [_read_mark(text, shape, kind, match) for kind, match in marks])
    if chosen is None or chosen.text is None or len(chosen.text) > _LONGEST:
        return None
    if is_taken_back(text[chosen.end :], chosen.text) or is_hedged(text[max(0, chosen.start - 200) : chosen.start]):
        return None
    answer = tidy(chosen.text)
    return FinalAnswer(answer, is_remark=chosen.is_remark) if answer else None


def _matches(shape: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield every mark with its kind: a language's code, ``box``, ``tag`` or ``option``."""
    lower = shape.lower()
    for code, pattern in _STATED.items():
        if any(noun in lower for noun in _NOUNS[code]):
            yield from ((code, match) for match in pattern.finditer(shape))
    for kind, pattern in (("box", _BOXED), ("tag", _TAG), ("option", _OPTION_IS), ("option", _OPTION_TAKEN)):
        yield from ((kind, match) for match in pattern.finditer(shape))


def _read_mark(text: str, shape: str, kind: str, match: re.Match[str]) -> _Mark:
    """Return the answer that a mark announces."""
    if kind == "box":
        return _boxed(text, match)
    if kind == "tag":
        content, closed, _ = text[match.end() :].partition("</answer>")
        end = match.end() + len(content) + len("</answer>")
        return _Mark(
            content if closed else None, match.start(), end, is_strong=True, is_remark=_is_long_remark(content)
        )
    if kind == "option":
        letter = match["worded"] or match["bracketed"] or match["plain"]
        supposed = _is_supposed(shape, match.start())
        return _Mark(None if supposed else letter, match.start(), match.end(), is_strong=False)
    return _stated(text, shape, kind, match)


def _stated(text: str, shape: str, code: str, match: re.Match[str]) -> _Mark:
    """Read "the answer is ..." to the end of its sentence, or of its line if it is a final one."""
    is_strong = _FINAL.search(match.group()) is not None
    spacing = _TO_ANSWER.match(shape, match.end())
    start = spacing.end() if spacing else match.end()
    line = text[start:].partition("\n")[0]
    adverb = _ADVERB.match(same_length(line))
    if adverb and not is_remark(line):
        start, line = start + adverb.end(), line[adverb.end() :]
    has_verb = not match.group().rstrip("*_`\"' \t").endswith((":", "="))
    if _is_supposed(shape, match.start()) or _is_denied(line, has_verb=has_verb):
        return _Mark(None, match.start(), start, is_strong)
    sentence = first_sentence(line)
    content = line if is_strong and code not in UNSPACED else sentence
    end = start + len(content)
    if code in UNSPACED:
        content = without_ending(content)
    return _Mark(content, match.start(), end, is_strong, is_remark=_is_long_remark(sentence))


def _is_long_remark(text: str) -> bool:
    """Return whether a text of several words is a remark: "clear" alone may be an answer."""
    text = text.strip()
    return (" " in text or re.search(f"[{EAST_ASIAN}]", text) is not None) and is_remark(text)


def _is_denied(line: str, *, has_verb: bool) -> bool:
    """Return whether a verb is followed by a denial: "is not 3"; "Answer: not 3" is an answer, if a poor one."""
    shape = same_length(line)
    return (has_verb and _DENIED.match(shape) is not None) or is_denied_after(first_sentence(shape))


def _is_supposed(text: str, start: int) -> bool:
    """Return whether the words before ``start`` make what follows no statement: "if the answer is 3"."""
    return _SUPPOSED.search(text[max(0, start - 60) : start]) is not None


def _boxed(text: str, match: re.Match[str]) -> _Mark:
    r"""Read a box, together with the boxes just before it: ``\boxed{A}, \boxed{C}``."""
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
        is_repeated = inner == parts and not between.strip(" \n$,;.&*")
        if is_repeated or not _BETWEEN_BOXES.fullmatch(same_length(between)):
            break
        start, parts = earlier.start(), f"{inner}{between.replace('$', '') or ' '}{parts}"
    unit = _UNIT_AFTER.match(text, end)
    if unit and parts == content:
        parts, end = f"{parts} {unit[1]}", unit.end()
    return _Mark(parts, start, end, is_strong=True, is_remark=_is_long_remark(parts))


def _is_part(text: str, start: int, end: int) -> bool:
    r"""Return whether a box is part of a larger formula: ``-\boxed{3}``, ``\boxed{3}^2``, ``\boxed{3} and 4``."""
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


def _bare(text: str) -> FinalAnswer | None:
    if not text or "\n" in text or len(text) > _MOST_BARE:
        return None
    shape = same_length(text)
    is_short = _BARE_LABEL.match(shape.strip(EMPHASIS)) is not None or _YES_OR_NO.fullmatch(shape) is not None
    if is_short or (not is_sentence(text) and first_sentence(text) == text):
        return FinalAnswer(
            tidy(text), is_sentence=bool(_NO_VERB.fullmatch(text)), is_remark=is_filler(text) or _is_long_remark(text)
        )
    if is_doubtful(text):
        return None
    reasoned = _REASONED.match(shape)
    if reasoned and first_sentence(text) == text and not is_sentence(reasoned["core"]):
        return FinalAnswer(text[: reasoned.end("core")], is_sentence=True)
    return _statement(tidy(text))


def _statement(sentence: str) -> FinalAnswer | None:
    """Return what a bare sentence such as "The car is red." says of its subject, if that is short and plain."""
    said = said_of_subject(sentence)
    if not said or len(said.split()) > _MOST_SAID or is_sentence(said) or is_remark(said):
        return None
    return None if is_alternative(f"x {said}") or _DENIED.match(said) else FinalAnswer(tidy(said), is_sentence=True)
