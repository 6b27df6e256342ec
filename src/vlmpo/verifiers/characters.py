"""Writes text in plain characters without changing what it says: full-width forms, other scripts' digits, mathematics.

``3²`` becomes ``3^2`` and ``½`` becomes ``1/2``; plain Unicode normalisation would make them ``32`` and ``11/2``.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_TEXT_COMMAND = re.compile(r"\\(?:text|textrm|textit|mathrm|mathbf|mathit|textbf|mbox|operatorname)\s*\{")
# One character for one: positions in the text stay as they are.
_SHAPES = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    ord(old): new
    for olds, new in [
        ("\u3000\xa0\u2002\u2003\u2007\u2009\u200a\u202f\t", " "),
        ("’‘‛′＇´", "'"),
        ("“”„«»″", '"'),
        ("【", "["),
        ("】", "]"),
    ]
    for old in olds
}
_SPACES = re.compile(r"\s{4,}")
_SIGNS_IN_A_ROW, _MOST_SIGNS = re.compile(r"[\W_]{65,}"), 32
_INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060\ufe00-\ufe0f\ufeff\xad]")
_HYPHENS = dict.fromkeys(map(ord, "−–‒‐‑﹣"), "-")
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
_LOWERED = "₀₁₂₃₄₅₆₇₈₉"
# Signs of mathematics as LaTeX; their neighbours may be letters, so a space follows a command.
_SIGNS = {
    "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "π": r"\pi ", "∞": r"\infty ", "×": "*", "·": "*", "⋅": "*",
    "∙": "*", "∗": "*", "÷": "/", "∕": "/", "⁄": "/", "±": r"\pm ", "≤": "<=", "⩽": "<=", "≥": ">=", "⩾": ">=",
    "≠": "!=", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "≈": r"\approx ", "˚": "°", "℃": "°C", "℉": "°F", "㎡": "m^2", "㎝": "cm", "㎞": "km", "㎏": "kg",
}  # fmt: skip
_SAME_SIGNS = {
    r"\times": "*", r"\cdot": "*", r"\ast": "*", r"\div": "/", r"\leqslant": "<=", r"\leq": "<=", r"\le": "<=",
    r"\geqslant": ">=", r"\geq": ">=", r"\ge": ">=", r"\neq": "!=", r"\ne": "!=", r"\lt": "<", r"\gt": ">",
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\degree": "°", r"\lbrace": r"\{",
    r"\rbrace": r"\}", r"\left": "", r"\right": "", r"\displaystyle": "", r"\quad": " ", r"\qquad": " ",
    r"\lvert": "|", r"\rvert": "|",
}  # fmt: skip


def same_length(text: str) -> str:
    """Write full-width characters, special spaces and quotes as ASCII; every position stays as it is."""
    return text.translate(_SHAPES)


def shortened(text: str) -> str:
    """Cut long runs of white space and of signs, which say nothing: patterns may try each way to divide a run."""
    text = _SPACES.sub(lambda run: "\n\n"[: run.group().count("\n")] or "   ", text)
    return _SIGNS_IN_A_ROW.sub(lambda run: f"{run.group()[:_MOST_SIGNS]}{run.group()[-_MOST_SIGNS:]}", text)


def plain(text: str) -> str:
    """Write ``text`` in plain characters, composed, on one line; a sign of mathematics keeps a form of its own."""
    text = _INVISIBLE.sub("", text)
    if text.isascii():
        return " ".join(text.split())
    text = unicodedata.normalize("NFC", text).translate(_SHAPES).translate(_HYPHENS)
    text = re.sub(rf"(?<=\d)(?=[{_LOWERED}])", "_", text)  # 101₂ is no 1012
    return " ".join("".join(map(_plain_character, _runs(text))).split())


@lru_cache(maxsize=1024)
def plain_math(text: str) -> str:
    r"""Write a formula in one LaTeX: ``√5`` and ``3\cdot x`` as ``\sqrt 5`` and ``3*x``; units lose their ``\text``."""
    if re.search(f"[{_RAISED}]√", text):
        return text  # 2³√5: a power or an index? With its sign left in, nobody reads it
    text = re.sub(f"[{_LOWERED}]+", lambda run: "_" + _in_braces(unicodedata.normalize("NFKC", run.group())), text)
    text = unwrap_latex(plain(text).replace("—", "-"))
    text = re.sub("|".join(map(re.escape, _SIGNS)), lambda sign: _SIGNS[sign.group()], text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)", "°", text)
    text = re.sub(r"\\[A-Za-z]+", lambda command: _SAME_SIGNS.get(command.group(), command.group()), text)
    text = re.sub(r"\\[,;:! ]|(?<=\d)~", " ", text.replace("{,}", ","))
    return " ".join(re.sub(r"\\([%$#&])", r"\1", text).split())


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


def _runs(text: str) -> list[str]:
    """Split into single characters, but keep raised and lowered characters together."""
    return re.findall(f"[{_RAISED}]+|[{_LOWERED}]+|.", text, re.DOTALL)


def _plain_character(run: str) -> str:
    if run[0] in _RAISED:
        return "^" + _in_braces(unicodedata.normalize("NFKC", run).replace("−", "-"))
    if run[0] in _LOWERED:
        return unicodedata.normalize("NFKC", run)
    if run.isdecimal():
        return str(unicodedata.decimal(run))
    kind = unicodedata.decomposition(run).partition(" ")[0]
    if kind == "<fraction>":
        return f" {unicodedata.normalize('NFKC', run).replace('⁄', '/')} "
    if kind in ("<wide>", "<narrow>", "<font>", "<noBreak>") or (kind == "<compat>" and run.isalpha()):
        return unicodedata.normalize("NFKC", run)
    return {"٫": ".", "٬": ",", "٪": "%", "،": ","}.get(run, run)


def _in_braces(digits: str) -> str:
    return digits if len(digits) == 1 else f"{{{digits}}}"
