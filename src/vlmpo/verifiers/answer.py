r"""The final answer of a response, as text; never a guess.

What counts, in this order:

1. The last of these marks: a "Final answer: ..." line (also "the final answer is ..."), ``\boxed{...}``,
   ``<answer>...</answer>``. Whichever stands later in the text wins; if that one holds nothing (it is cut off,
   empty or denied), neither does the response: an earlier one is not fallen back on.
2. Without such a mark, the last plain statement of an answer: "Answer: B", "the answer is 3", "option C is correct".
3. Without that either, a response that is nothing but an answer: one short line, no sentence.
"""

from __future__ import annotations

import re


def word_set(text: str) -> frozenset[str]:
    """The words of ``text``."""
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
# What, before a statement, makes it none.
_SUPPOSED = re.compile(
    r"(?:\b(?:if|whether|unless|suppose|supposing|assume|assuming|not|never|cannot|than)|n't)"
    r"(?:\s+(?:that|the|my|an?|say|to|correct|right|best))*\s*$",
    re.IGNORECASE,
)
# After these a full stop does not end a sentence; nor does it after a single letter ("C. The red one", "John F. K.").
_TITLES = frozenset({"dr", "mr", "mrs", "ms", "st", "prof", "no", "vs", "jr", "sr", "approx", "ca", "fig", "inc", "co"})

_BARE_LABEL = re.compile(
    r"(?:(?:option|choice)\s+\(?[A-Za-z]\)?[.:]?$|\([A-Za-z]\)|[A-Za-z]\)|[A-Z][.:](?:\s|$))", re.IGNORECASE
)
_SENTENCE_WORDS = word_set(
    "i i'm it's there's is isn't are aren't was wasn't were weren't has have had shows show appears appear "
    "seems seem think believe would could should can can't cannot do don't does doesn't because since so "
    "therefore thus sorry unable unsure maybe perhaps either or"
)
_BARE_WORDS, _BARE_CHARACTERS = 12, 120
_LONGEST = 1000  # characters of a final answer; a longer one is a story, and slow to read


def parse_final_answer(text: str) -> str | None:
    """The final answer as the response words it, freed of emphasis and of a surrounding ``$``.

    Of several answers the last counts. A reasoning block (``<think>...</think>``) is not part of the response; one
    that is never closed leaves no response.

    Args:
        text: a whole response.

    Returns:
        The answer's text, on one line unless boxed; None where no final answer can be read.
    """
    text = _without_thoughts(text.replace("\r\n", "\n"))
    strong = list(_STRONG.finditer(text))
    if strong:
        found = _marked(text, strong[-1])
    elif (stated := _last_statement(text)) is not None:
        found = stated
    else:
        found = _bare(text)
    if found is None or not found.strip() or len(found) > _LONGEST:
        return None
    return tidy(found) or None


def tidy(text: str) -> str:
    """``text`` without white space, emphasis, ``$...$`` and full stop around it; as it is where that is all."""
    whole = text.strip()
    text = whole.strip(_EMPHASIS + " \t")
    text = re.sub(r"(?<!\.)\.$", "", text).rstrip(_EMPHASIS + " \t")
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner.strip() and opening not in inner:
            text = inner.strip()
    return text or whole


def braced(text: str, start: int) -> str | None:
    r"""What stands between the brace that was opened before ``start`` and the one that closes it; None if none does.

    ``\{`` and ``\}`` are characters, not braces.
    """
    depth = 1
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            return text[start : found.start()]
    return None


def first_sentence(text: str) -> str:
    """``text`` up to the first full stop, ``!`` or ``?`` that a capital letter follows."""
    for found in re.finditer(r"[.!?](?=\s+[A-Z])", text):
        before = re.search(r"(\w+)\W*$", text[: found.start()])
        word = before.group(1).lower() if before else ""
        if not (word in _TITLES or (len(word) == 1 and word.isalpha())):
            return text[: found.start()]
    return text


def _without_thoughts(text: str) -> str:
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after
    return text.partition("<think>")[0]


def _marked(text: str, mark: re.Match[str]) -> str | None:
    if mark["boxed"]:
        content = braced(text, mark.end())
    elif mark["tag"]:
        content, closed, _ = text[mark.end() :].partition("</answer>")
        content = content if closed else None
    else:
        content = text[mark.end() :].partition("\n")[0]
        if not mark["final"].rstrip().endswith((":", "：", "=")) and _NEGATED.match(content):
            return None  # "the final answer is not 3" tells none
        if _SUPPOSED.search(text[: mark.start()][-60:]):
            return None
    return content


def _last_statement(text: str) -> str | None:
    """The last "the answer is ..." or "option C is correct", as written; "" where that one denies or supposes."""
    found: list[tuple[int, str]] = []
    for statement in _STATED.finditer(text):
        rest = statement["rest"]
        denied = _NEGATED.match(rest) or _SUPPOSED.search(text[: statement.start()][-60:])
        found.append((statement.start(), "" if denied else first_sentence(rest)))
    for pattern, key in ((_OPTION_IS, "a"), (_OPTION_TAKEN, "b")):
        for statement in pattern.finditer(text):
            denied = _SUPPOSED.search(text[: statement.start()][-60:])
            found.append((statement.start(), "" if denied else statement[f"{key}1"] or statement[f"{key}2"]))
    return max(found)[1] if found else None


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
