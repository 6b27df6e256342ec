r"""Finds the marks by which responses announce answers: "The answer is B.", ``\boxed{B}``, "option B is correct"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vlmpo.verifiers.characters import braced, same_length
from vlmpo.verifiers.doubt import is_remark
from vlmpo.verifiers.languages import EAST_ASIAN, LANGUAGES, LETTERS, UNSPACED, word_set, words
from vlmpo.verifiers.numbers import are_plain, read_quantity
from vlmpo.verifiers.sentences import first_sentence, is_denied_after, without_ending

OPTION, STATED, FINAL = range(3)  # how much a mark weighs
_MOST_MARKS = 20  # that are looked at, from the end
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
_TO_ANSWER = re.compile(r"(?:\*\*|__|[*_](?=\s)|[` \t])*\n*(?:\*\*|__|[` \t])*")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_FINAL = re.compile(words("final"), re.IGNORECASE)
_WORDED = rf"(?i:{words('option')})\s*\(?(?P<worded>[A-Za-z])\)?"
_BARE_LETTER = rf"\((?P<bracketed>[A-Za-z])\)|(?<![{LETTERS}'])(?P<plain>[A-J])"
# Only at the end of its clause: "option B is correct only for squares" and "we choose B as the origin" choose nothing.
_CLAUSE_ENDS = r"(?=[*_`)\]\s]*(?:[.,;!。]|$|\n|because\b|since\b|as\s+(?:shown|it)\b))"
_OPTION_IS = re.compile(
    rf"(?:{_WORDED}|{_BARE_LETTER})[*_`]*(?:(?:项|选项)?是|[はが]|\s+(?:seems|appears|{words('be')}))\s*"
    rf"(?:to\s+be\s+)?(?:the\s+)?(?:(?:most|only)\s+(?:\w+\s+)?)?(?i:{words('correct')})"
    rf"(?:的?(?:答案|选项)?|です|\s+(?:answer|option|choice|one|antwort)){_CLAUSE_ENDS}"
)
_OPTION_TAKEN = re.compile(
    r"(?:\b(?i:choose|chose|select|pick|go\s+with)\s+(?:the\s+)?|(?<![不没別别可])(?:选择|选|選擇|選)(?![项項])\s*:?\s*)"
    rf"(?:{_WORDED}|{_BARE_LETTER})(?![{LETTERS}'])(?:选项|选項|项|項)?{_CLAUSE_ENDS}"
)
_KINDS = (("box", _BOXED), ("tag", _TAG), ("option", _OPTION_IS), ("option", _OPTION_TAKEN))
_DENIED = re.compile(rf"\s*(?:{words('denial')})", re.IGNORECASE)
# What may stand before a statement: in its clause, "so the answer is 3"; and in its sentence no "if".
_CLAUSE = re.compile(r"[.,;:!?(){\n—–。、\[]|-\s|\b(?:so|therefore)\b", re.IGNORECASE)
_LEAD = re.compile(rf"[\W_]*(?:{words('lead')}[\W_]*)*", re.IGNORECASE)
_PREMISE = re.compile(words("premise"), re.IGNORECASE)
_ECHO = re.compile(r"^\s*>|\be\.\s?g\.|\b(?:for example|format|sample|例如|格式)", re.IGNORECASE)
# "The answer is as follows: 17."
_FOLLOWS = re.compile(
    r"\s*(?:(?:as follows|如下|wie folgt|como sigue|comme suit)\s*[:.]|(?:given|shown) below\s*[:.]?\s*\n)[\s*_]*",
    re.IGNORECASE,
)
_ADVERB = re.compile(rf"\s*(?:{words('adverb')})[\s,]+", re.IGNORECASE)
# What makes a box a part of a formula that begins before it. `- \boxed{3}` on a line of its own is a list.
_LEADS_IN = re.compile(
    r"(?:(?<![A-Za-z])[A-Za-z]|[\d)}\]])$|[\w)}] ?[+\-−/^±×] ?\$?$|[\w)}] \* $|(?:^|[=$(:\s])[-−+±√]\$?$|\\[a-z]+\s?$"
    r"|(?:[<>≤≥≠≈~]|\\(?:lt|gt|leq?|geq?|neq?|approx|pm|times|cdot|div)|(?:^|\$)\s*\d+\s*:)[\s$]*$"
)
_REJECTED = re.compile(words("rejected"), re.IGNORECASE)
_LIMITED = re.compile(rf"(?:{words('limit')}|(?:{words('denial')}|n't)(?:\s+\S+)?)\s*$", re.IGNORECASE)
_OPENED = re.compile(r"(?P<to>\\[A-Za-z]+|(?<=[}\]])|[\^_])\{|(?<![}\]])\{|\}")
_WRAPPERS = frozenset({None} | {rf"\{name}" for name in word_set("textbf mathbf text textit mathrm mbox underline")})
_BOX_ENDS = re.compile(r"\$|\*\*|\\[)\]]|`|</?\w+>|\\end\{\w+\*?\}|\\\\(?![a-z])")
_IS_ANSWER = re.compile(rf"[\s,]*(?:{words('be')}\s+(?:(?:my|our)\s+)?|[がは]){words('correct')}.*", re.IGNORECASE)
_BETWEEN_BOXES = re.compile(rf"[\s$,;.&*(]*(?:{words('alternative', 'both')})?[\s$,;.&*]*", re.IGNORECASE)
_LABEL = re.compile(r"(?:^|[\n.;,}$])[ *_#]*(?P<label>\([a-z0-9]\)|[A-Za-z]*\s?\d+[.):]|[^\n.;:]{1,30}:)[\s*_$\\(\[]*$")
_PART = re.compile(r"\(\w\)|(?i:part|question|case) \w+")  # "the answer to (b) is"


@dataclass(frozen=True, slots=True)
class Mark:
    """Holds where an answer is announced.

    Attributes:
        text: the answer; None if it is cut off, denied, supposed, a part of something else, or not the response's own.
        start: of the mark.
        end: of the answer.
        weight: ``FINAL`` for boxes, tags and "final answer"; ``STATED`` for "the answer is"; ``OPTION`` for "option B
            is correct".
        is_remark: whether it speaks about the answer: "clear from the chart".
        label: what its line begins with if that tells it from other answers: "(a)", "Case 1:"; or "".
    """

    text: str | None
    start: int
    end: int
    weight: int
    is_remark: bool = False
    label: str = ""


def find_marks(text: str) -> list[Mark]:
    """Return the marks of a response in their order, at most the last 20."""
    shape = same_length(text)
    found = sorted(_matches(shape), key=lambda found: found[1].start())[-_MOST_MARKS:]
    marks = []
    for kind, match in found:
        if kind == "box":
            marks.append(_boxed(text, match))
        elif kind == "tag":
            marks.append(_tagged(text, match))
        elif kind == "option":
            letter = match["worded"] or match["bracketed"] or match["plain"]
            if _may_lead(shape, match.start()):
                marks.append(Mark(letter, match.start(), match.end(), OPTION))
        else:
            marks.append(_stated(text, shape, kind, match))
    return marks


def _matches(shape: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield every mark with its kind: a language's code, ``box``, ``tag`` or ``option``."""
    lower = shape.lower()
    for code, pattern in _STATED.items():
        if any(noun in lower for noun in _NOUNS[code]):
            yield from ((code, match) for match in pattern.finditer(shape))
    for kind, pattern in _KINDS:
        yield from ((kind, match) for match in pattern.finditer(shape))


def _tagged(text: str, match: re.Match[str]) -> Mark:
    content, closed, _ = text[match.end() :].partition("</answer>")
    end = match.end() + len(content) + len("</answer>")
    return Mark(content if closed else None, match.start(), end, FINAL, is_remark=is_long_remark(content))


# --- "the answer is" --------------------------------------------------------------------------------------------------


def _stated(text: str, shape: str, code: str, match: re.Match[str]) -> Mark:
    """Read "the answer is ..." to the end of its sentence."""
    weight = FINAL if _FINAL.search(match.group()) else STATED
    spacing = _TO_ANSWER.match(shape, match.end())
    start = spacing.end() if spacing else match.end()
    line = text[start:].partition("\n")[0]
    if follows := _FOLLOWS.match(same_length(text), start):
        start = follows.end()
        line = text[start:].partition("\n")[0]
    adverb = _ADVERB.match(same_length(line))
    if adverb and not is_remark(line):
        start, line = start + adverb.end(), line[adverb.end() :]
    has_verb = not match.group().rstrip("*_`\"' \t").endswith((":", "="))
    if not _may_lead(shape, match.start()) or is_denied(line, has_verb=has_verb):
        return Mark(None, match.start(), start, weight)
    sentence = first_sentence(line)
    if (opened := shape[max(0, match.start() - 1) : match.start()]) in ("*", "_"):  # *Answer: blue*
        sentence = sentence.rstrip(opened)
    content = without_ending(sentence) if code in UNSPACED else sentence
    part = _PART.search(match.group())
    label = part.group() if part else _label(shape, match.start())
    end = start + len(sentence)
    return Mark(content, match.start(), end, weight, is_remark=is_long_remark(sentence), label=label)


def _may_lead(shape: str, start: int) -> bool:
    """Return whether the words before a statement leave it one: no "if", and nobody else's or another answer."""
    before = shape[max(0, start - 200) : start]
    sentence = re.split(r"[.!?;]\s|[\n。!?]", before)[-1]
    if _PREMISE.search(sentence) or _ECHO.search(before.rpartition("\n")[2]):
        return False
    return _LEAD.fullmatch(_CLAUSE.split(before)[-1]) is not None


def is_denied(line: str, *, has_verb: bool) -> bool:
    """Return whether a verb is followed by a denial: "is not 3"; "Answer: not 3" is an answer, if a poor one."""
    shape = same_length(line)
    return (has_verb and _DENIED.match(shape) is not None) or is_denied_after(first_sentence(shape))


def is_long_remark(text: str) -> bool:
    """Return whether a text of several words is a remark: "clear" alone may be an answer."""
    text = text.strip()
    return (" " in text or re.search(f"[{EAST_ASIAN}]", text) is not None) and is_remark(text)


def _label(shape: str, start: int) -> str:
    label = _LABEL.search(shape[max(0, start - 50) : start])
    return label["label"] if label and not any(pattern.search(label["label"]) for pattern in _STATED.values()) else ""


# --- boxes ------------------------------------------------------------------------------------------------------------


def _boxed(text: str, match: re.Match[str]) -> Mark:
    r"""Read a box with the rest of its sentence, and with the boxes just before it: ``\boxed{A}, \boxed{C}``."""
    content = braced(text, match.end())
    end = match.end() + len(content or "") + 1
    start, parts = match.start(), content or ""
    for earlier in reversed(list(_BOXED.finditer(text, max(0, start - 200), start))):
        inner = braced(text, earlier.end())
        if inner is None:
            break
        between = text[earlier.end() + len(inner) + 1 : start]
        is_repeated = inner == parts and not between.strip(" \n$,;.&*")
        if is_repeated or not _BETWEEN_BOXES.fullmatch(same_length(between)):
            break
        start, parts = earlier.start(), f"{inner}{between.replace('$', '') or ' '}{parts}"
    if content is None or _is_part(text, start) or text[end : end + 1] == "!":  # maybe a factorial
        return Mark(None, start, end, FINAL)
    rest = first_sentence(text[end:].partition("\n")[0])
    parts += _beside_box(rest, parts)
    end += len(rest)
    label = _label(same_length(text), start)
    return Mark(parts, start, end, FINAL, is_remark=is_long_remark(parts), label=label)


def _beside_box(rest: str, content: str) -> str:
    """Return what the rest of a box's sentence adds to its content: " million"; "" for "is the answer"."""
    rest = without_ending("x" + _BOX_ENDS.sub("", rest.lstrip("}")))[1:]
    if not rest.strip(" .,;:!*_)。") or _IS_ANSWER.fullmatch(rest):
        return ""
    is_formula = re.search(r"[\d\\]", content) and not read_quantity(content)
    return "" if is_formula and rest[0] == " " and are_plain(rest.strip(" .,").split()) else rest


def _is_part(text: str, start: int) -> bool:
    r"""Return whether what stands before a box makes it a part of something: ``-\boxed{3}``, ``at least \boxed{3}``."""
    before = re.sub(r"</?\w+>\s*$", "", same_length(text[max(0, start - 200) : start]))
    if _LEADS_IN.search(before[-12:]) or _ECHO.search(before.rpartition("\n")[2]):
        return True
    opened: list[str | None] = []
    for brace in _OPENED.finditer(before.rpartition("\n")[2]):
        if brace.group() != "}":
            opened.append(brace["to"])
        elif opened:
            opened.pop()
    clause = _CLAUSE.split(before.rstrip(" $*_(["))[-1]
    return not set(opened) <= _WRAPPERS or bool(_LIMITED.search(clause) or _REJECTED.search(clause))
