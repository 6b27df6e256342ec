r"""Reads the final answer of a response, as text, without guessing.

In this order:

1. The last of these marks: a "Final answer: ..." line (also "the final answer is ..."), ``\boxed{...}``,
   ``<answer>...</answer>``. If the last one is cut off, empty or denied, there is no final answer: an earlier mark is
   not used instead.
2. Without such a mark, the last plain statement of an answer: "Answer: B", "the answer is 3", "option C is correct".
3. Without that either, a response that is nothing but an answer: one short line, no sentence.
"""

from __future__ import annotations

import re


def word_set(text: str) -> frozenset[str]:
    """Return the set of the words of ``text``."""
    return frozenset(text.split())


_EMPHASIS = "*_`#"
# `is` but not `isn't`; a colon of any script; or a heading, with the answer on the next line.
_STRONG = re.compile(
    r"(?P<final>final[ \t]+answer[*_`\"' \t]*(?:(?:is|are|was)\b[ \t]*[:：]?|[:：=]|(?=\n))[*_` \t]*\n*)"
    r"|(?P<boxed>\\(?:boxed|fbox)\s*\{)"
    r"|(?P<tag><answer>)",
    re.IGNORECASE,
)
_STATED = re.compile(
    r"\b(?:answer|(?:correct|right|best)\s+(?:option|choice))\b[*_`]*"
    r"(?:\s+(?:is|would\s+be|should\s+be|must\s+be)\b[ \t]*[:：]?|[ \t]*[:：=])[*_` \t]*\n*(?=(?P<rest>[^\n]*))",
    re.IGNORECASE,
)
_LABEL = r"(?:(?i:option|choice|answer)\s+\(?(?P<{0}1>[A-Za-z])\)?|\((?P<{0}2>[A-Za-z])\))"
_OPTION_IS = re.compile(
    _LABEL.format("a") + r"[*_`]*\s+(?:is|seems|appears)\s+(?:to\s+be\s+)?(?:the\s+)?(?:most\s+\w+\s+)?"
    r"(?:correct|right|best|answer)\b"
)
_OPTION_TAKEN = re.compile(r"\b(?i:choose|chose|select|pick|go\s+with)\s+(?:the\s+)?" + _LABEL.format("b") + r"(?!\w)")
_NEGATED = re.compile(r"\s*(?:\w+ly\s+)?(?:not\b|never\b|neither\b|nor\b|no\s+longer\b)", re.IGNORECASE)
# Words that, before a statement, make it none.
_SUPPOSED = re.compile(
    r"(?:\b(?:if|whether|unless|suppose|supposing|assume|assuming|not|never|cannot|than)|n't)"
    r"(?:\s+(?:that|the|my|an?|say|to|correct|right|best))*\s*$",
    re.IGNORECASE,
)
# A full stop after these does not end a sentence, nor one after a single letter ("C. The red one", "John F. K.").
_TITLES = frozenset({"dr", "mr", "mrs", "ms", "st", "prof", "no", "vs", "jr", "sr", "approx", "ca", "fig", "inc", "co"})

_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{")

_BARE_LABEL = re.compile(
    r"(?:(?:option|choice)\s+\(?[A-Za-z]\)?[.:]?$|\([A-Za-z]\)|[A-Za-z]\)|[A-Z][.:](?:\s|$))", re.IGNORECASE
)
_SENTENCE_WORDS = word_set(
    "i i'm it's there's is isn't are aren't was wasn't were weren't has have had shows show appears appear "
    "seems seem think believe would could should can can't cannot do don't does doesn't because since so "
    "therefore thus sorry unable unsure maybe perhaps either or"
)
_BARE_WORDS, _BARE_CHARACTERS = 12, 120
_LONGEST = 1000  # characters of a final answer; a longer one is a story, and slow to parse


def parse_final_answer(text: str) -> str | None:
    """Return the final answer in the response's words, without emphasis and a surrounding ``$``.

    The last of several answers counts. A reasoning block (``<think>...</think>``) is not part of the response; after
    one that is never closed there is no response.

    Args:
        text: a whole response.

    Returns:
        The answer's text, on one line unless boxed; None if no final answer can be read.
    """
    text = text.replace("\r\n", "\n")
    _, closed, after = text.rpartition("</think>")
    text = after if closed else text.partition("<think>")[0]
    answer: str | None
    if marks := list(_STRONG.finditer(text)):
        answer = _marked(text, marks[-1])
    elif (answer := _last_statement(text)) is None:
        answer = _bare(text)
    if answer is None or not answer.strip() or len(answer) > _LONGEST:
        return None
    return tidy(answer) or None


def tidy(text: str) -> str:
    """Strip white space, emphasis, ``$...$`` and a full stop around ``text``, unless nothing else is left."""
    whole = text.strip()
    text = whole.strip(_EMPHASIS + " \t")
    text = re.sub(r"(?<!\.)\.$", "", text).rstrip(_EMPHASIS + " \t")
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner.strip() and opening not in inner:
            text = inner.strip()
    return text or whole


def braced(text: str, start: int) -> str | None:
    r"""Return what is between the brace opened just before ``start`` and the one that closes it; None if none does.

    ``\{`` and ``\}`` are characters, not braces.
    """
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : brace.start()]
    return None


def unwrap_latex(text: str) -> str:
    r"""Replace ``\text{cm}``, ``\textbf{(b)}`` and the like by a space and their content."""
    while opened := _TEXT_COMMAND.search(text):
        inner = braced(text, opened.end())
        if inner is None:
            return text
        text = f"{text[: opened.start()]} {inner}{text[opened.end() + len(inner) + 1 :]}"
    return text


def first_sentence(text: str) -> str:
    """Return ``text`` up to the first full stop, ``!`` or ``?`` that is followed by a capital letter."""
    for stop in re.finditer(r"[.!?](?=\s+[A-Z])", text):
        before = re.search(r"(\w+)\W*$", text[: stop.start()])
        word = before.group(1).lower() if before else ""
        if not (word in _TITLES or (len(word) == 1 and word.isalpha())):
            return text[: stop.start()]
    return text


def _marked(text: str, mark: re.Match[str]) -> str | None:
    if mark["boxed"]:
        content = braced(text, mark.end())
    elif mark["tag"]:
        content, closed, _ = text[mark.end() :].partition("</answer>")
        content = content if closed else None
    else:
        content = text[mark.end() :].partition("\n")[0]
        if not mark["final"].rstrip().endswith((":", "：", "=")) and _NEGATED.match(content):
            return None  # "the final answer is not 3" states none
        if _is_supposed(text, mark.start()):
            return None
    return content


def _last_statement(text: str) -> str | None:
    """Return the last "the answer is ..." or "option C is correct", as written; "" if it is denied or supposed."""
    statements: list[tuple[int, str]] = []
    for statement in _STATED.finditer(text):
        rest = statement["rest"]
        denied = _NEGATED.match(rest) or _is_supposed(text, statement.start())
        statements.append((statement.start(), "" if denied else first_sentence(rest)))
    for pattern, key in ((_OPTION_IS, "a"), (_OPTION_TAKEN, "b")):
        for statement in pattern.finditer(text):
            letter = statement[f"{key}1"] or statement[f"{key}2"]
            statements.append((statement.start(), "" if _is_supposed(text, statement.start()) else letter))
    return max(statements)[1] if statements else None


def _is_supposed(text: str, start: int) -> bool:
    """Return whether the words before ``start`` make what follows no statement: "if the answer is 3"."""
    return _SUPPOSED.search(text[:start][-60:]) is not None


def _bare(text: str) -> str | None:
    line = text.strip()
    if not line or "\n" in line or len(line) > _BARE_CHARACTERS:
        return None
    if _BARE_LABEL.match(line.strip(_EMPHASIS)):
        return line
    words = line.lower().replace("’", "'").split()
    is_sentence = any(word.strip(".,;:!?") in _SENTENCE_WORDS for word in words)
    if is_sentence or len(words) > _BARE_WORDS or first_sentence(line) != line:
        return None
    return line
