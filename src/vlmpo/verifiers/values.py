"""Compares values part by part: points, intervals, sets, lists, ratios, times of day, quantities, formulas."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from vlmpo.verifiers.characters import plain_math
from vlmpo.verifiers.formula import Formula, FormulaError, read_formula, same_formula
from vlmpo.verifiers.languages import words
from vlmpo.verifiers.numbers import Quantity, known_unit, read_quantity
from vlmpo.verifiers.sentences import tidy
from vlmpo.verifiers.units import UNLIKE

_OPEN, _CLOSE = "([{", ")]}"
_ORDERED = frozenset({"()", "(]", "[)", "[]", "<>", "colon", "by", "values"})
_COLON = re.compile(r"(\d+(?:\.\d+)?(?: ?: ?\d+(?:\.\d+)?)+) ?(a\.?m\.?|p\.?m\.?)?", re.IGNORECASE)
_RATIO_WORDS = re.compile(r"(\d+(?:\.\d+)?) (?:to|zu|à|a|к|para) (\d+(?:\.\d+)?)")
_BY = re.compile(r"\d+(?:\.\d+)?(?: ?(?:[x*]|by|por|mal|sur) ?\d+(?:\.\d+)?)+", re.IGNORECASE)
_ASSIGNED = re.compile(r"([A-Za-z](?:_\w)?) ?(?:=|\\in\b) ?(.+)")
_RELATION = re.compile(r"(<=|>=|!=|=|<|>)")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_JOINTS = re.compile(rf"\s*,?\s*{words('alternative', 'both')}(?!\s*=)\s*|\s*[,;]\s*", re.IGNORECASE)
_GROUPED_NUMBER = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Structure:
    """Holds a value made of parts.

    Attributes:
        kind: its brackets, ``()`` of a point or an open interval; ``set``, ``list``, ``union``, ``colon`` for a ratio
            or time of day, ``by`` for dimensions, ``values`` of named unknowns, ``relation``.
        parts: as written.
        note: "am" or "pm" of a time; the names of ``values``; the signs of a ``relation``.
    """

    kind: str
    parts: tuple[str, ...]
    note: str = ""


@lru_cache(maxsize=1024)
def read_structure(text: str) -> Structure | None:
    """Return the parts of a value that is more than one number or expression; None if it is not."""
    shape = plain_math(re.sub(r"(?<=\d)\s*×\s*(?=\d)", " x ", re.sub(r"(?<!\\)\$", "", tidy(text)))).strip()
    if len(shape) > 200:
        return None
    return (
        _time_or_ratio(shape)
        or _solutions(shape)
        or _union(shape)
        or _bracketed(shape)
        or _listed(shape)
        or _relation(shape)
    )


def same_structure(answer: Structure, truth: Structure) -> bool | None:
    """Return whether two values agree in every part; None if that cannot be told."""
    if answer.kind == truth.kind == "colon":
        return _same_colon(answer, truth)
    if answer.kind == truth.kind == "relation":
        return _same_relation(answer, truth)
    if {answer.kind, truth.kind} <= {"set", "list", "union"}:
        if answer.kind == truth.kind == "list":
            same = _all(map(same_value, answer.parts, truth.parts)) if len(answer.parts) == len(truth.parts) else False
            return same or (None if _same_members(answer.parts, truth.parts) is not False else False)
        return _same_members(answer.parts, truth.parts)
    if answer.kind == truth.kind:
        if answer.note != truth.note or len(answer.parts) != len(truth.parts):
            return False
        return _all(map(same_value, answer.parts, truth.parts))
    if "relation" in (answer.kind, truth.kind):
        ranges = [_range(structure) if structure.kind == "relation" else structure for structure in (answer, truth)]
        return same_structure(ranges[0], ranges[1]) if ranges[0] and ranges[1] else None
    if {answer.kind, truth.kind} == {"values", "()"} and len(answer.parts) == len(truth.parts):
        names = (answer if answer.kind == "values" else truth).note
        return _all(map(same_value, answer.parts, truth.parts)) if names in ("x y", "x y z") else None
    is_other_form = "list" in (answer.kind, truth.kind)
    return None if is_other_form and _same_members(answer.parts, truth.parts) is not False else False


def same_value(answer: str, truth: str) -> bool | None:
    """Return whether two values are equal: structures in every part, quantities and formulas exactly.

    Returns:
        None if one of them cannot be read to its last character.
    """
    if squeezed(answer) == squeezed(truth):
        return True
    right, read = read_quantity(truth), read_quantity(answer)
    if right and read:
        same = same_quantity(read, right)
        if same is not False or _is_rounded(answer, truth) or _is_rounded(truth, answer):
            return same is not None or None
        return None if _is_rounded(answer, truth, least=2) or _is_rounded(truth, answer, least=2) else False
    whole, parts = (None if quantity else read_structure(text) for quantity, text in ((right, truth), (read, answer)))
    if whole and parts:
        return same_structure(parts, whole)
    if whole or parts:
        return _across(answer if whole else truth, whole or parts)
    return _same_expression(answer, truth)


def squeezed(text: str) -> str:
    """Return ``text`` in plain characters, lower case and without the spaces around its signs."""
    shape = plain_math(re.sub(r"(?<!\\)\$", "", tidy(text)))
    return re.sub(r"\s*([;:()\[\]{}=<>+*/^|\\-]|(?<!\d),|,(?!\s*\d))\s*", r"\1", shape)


def same_quantity(read: Quantity, truth: Quantity, tolerance: Fraction = Fraction(0)) -> bool | None:
    """Return whether ``|read - truth| <= tolerance * |truth|``, in their units; a unit on one side only is ignored.

    45 %, 45 and 0.45 agree if one side has the percent sign and the other has none.

    Returns:
        None if their units or names cannot be compared, or if they agree only with a point read as a comma.
    """
    one, other = read.value, truth.value
    if read.unit and truth.unit and read.unit != truth.unit:
        return None if any({read.unit, truth.unit} <= unlike for unlike in UNLIKE) else False
    if read.unit and truth.unit:
        one, other = one * read.scale, other * truth.scale
    pairs = [(one, other)]
    if read.percent != truth.percent:
        pairs.append((one / 100, other) if read.percent else (one, other / 100))
    agrees = [abs(a - b) <= tolerance * abs(b) for a, b in pairs]
    if not any(agrees):
        return None if _may_agree(read, truth) else False
    if not agrees[-1] and 0 < abs(other if read.percent else one) <= 1:  # 0.12 % and 0.12
        return None
    return True if _same_names(read, truth) else None


def _may_agree(read: Quantity, truth: Quantity) -> bool:
    """Return whether a point read as a separator of thousands makes them agree, as some languages write them."""
    return (read.otherwise is not None and read.otherwise == truth.value and read.otherwise >= 1000) or (
        truth.otherwise is not None and read.otherwise is None and truth.otherwise == read.value
    )


def _same_names(read: Quantity, truth: Quantity) -> bool:
    """Return whether what is counted or measured may be the same thing: a circle, red circles; not 3 lb and 3 dogs."""
    if read.variable and truth.variable and read.variable != truth.variable:
        return False
    one, other = ({word.rstrip("s") for word in re.findall(r"\w+", quantity.noun)} for quantity in (read, truth))
    if (read.unit and other) or (truth.unit and one):
        return False
    return not one or not other or bool(one & other)


def _across(text: str, structure: Structure | None) -> bool | None:
    """Compare a structure with a value that has no parts: not equal, if that can be read."""
    if structure is None or structure.kind == "relation":
        return _same_side(text, structure)
    if len(structure.parts) > 1 and re.fullmatch(r"-?\d+(,-?\d+)+", squeezed(text)):  # 3,5 may be a list
        same = _same_members(squeezed(text).split(","), structure.parts)
        return same if structure.kind in ("set", "list") or not same else None
    if structure.note == "or" and any(same_value(text, part) for part in structure.parts):
        return None  # one of the two may be all that is asked for
    if structure.kind == "by" or (structure.kind == "set" and len(structure.parts) == 1):
        return None
    if structure.kind == "colon" and len(structure.parts) == 2 and same_value(text, "/".join(structure.parts)):
        return None
    return False if read_quantity(text) or is_expression(text) else None


def _same_side(text: str, relation: Structure | None) -> bool | None:
    """Compare ``2x + 1`` with ``y = 2x + 1``."""
    if (
        relation is None
        or relation.note != "="
        or not re.fullmatch(r"[A-Za-z](?:\([a-z]\))?", relation.parts[0].strip())
    ):
        return None
    return _same_expression(text, relation.parts[1])


def _same_expression(answer: str, truth: str) -> bool | None:
    if any(re.fullmatch(r"\d+(?:\.\d+)? ?- ?\d+(?:\.\d+)?", plain_math(_bare(text))) for text in (answer, truth)):
        return None  # a range or a difference?
    (one, unit), (other, right_unit) = _without_unit(answer), _without_unit(truth)
    if unit and right_unit and unit != right_unit:
        return None
    letters = _letters(other)
    try:
        formulas = [read_formula(_bare(side), letters=letters) for side in (one, other)]
    except FormulaError:
        return None
    same = same_formula(*formulas) or _is_rounded(one, other) or _is_rounded(other, one)
    return True if same else None if _may_mean_the_same(formulas, one, other) else same_formula(*formulas)


def _may_mean_the_same(formulas: list[Formula], one: str, other: str) -> bool:
    """Return whether two formulas differ only as they are read: a logarithm's base, x named n."""
    names = [formula.variables for formula in formulas]
    if re.search(r"\blog(?!_)|\\log(?!_)", one + other):
        return True
    if len(names[0]) == len(names[1]) == 1 and names[0] != names[1] and min(names[0] | names[1]).islower():
        return True
    return _is_rounded(one, other, least=2) or _is_rounded(other, one, least=2)


def _is_rounded(decimal: str, exact: str, *, least: int = 6) -> bool:
    """Return whether ``decimal`` is ``exact`` to all of its decimals, at ``least`` so many."""
    import mpmath

    digits = re.fullmatch(r"-?\d*\.(\d+)", squeezed(decimal))
    if not digits or len(digits[1]) < least:
        return False
    with mpmath.workdps(50):
        try:
            formula = read_formula(_bare(exact))
        except FormulaError:
            return False
        if formula.variables:
            return False
        given, value, unit = mpmath.mpf(squeezed(decimal)), formula.value({}), mpmath.mpf(10) ** -len(digits[1])
        if mpmath.im(value):
            return False
        rest = (value - given) * (-1 if decimal.lstrip().startswith(("-", "−")) else 1)
        return bool(-0.5001 * unit < rest < 0.9999 * unit)  # rounded or cut


@lru_cache(maxsize=1024)
def is_expression(text: str) -> bool:
    """Return whether ``text`` is a formula, to its last character."""
    try:
        read_formula(_bare(text), letters=_letters(text))
    except FormulaError:
        return False
    return True


def _without_unit(text: str) -> tuple[str, str]:
    """Split ``25\\pi cm^2`` into the formula and its unit ("" if there is none)."""
    unit = re.fullmatch(r"(.*[\d)}\s][\d)}]?|\S*\\\w+) +([^\W\d_]{1,14}(?:\^[23])?)", plain_math(_bare(text)))
    return (unit[1], unit[2]) if unit and known_unit(unit[2]) else (text, "")


def _bare(text: str) -> str:
    return re.sub(r"(?<!\\)\$", "", tidy(text))


def _letters(text: str) -> frozenset[str]:
    """Return the letters of a formula that may stand side by side; words are no products."""
    bare = re.sub(r"\\[A-Za-z]+", " ", plain_math(text))
    runs = re.findall(r"[A-Za-z]+", re.sub(r"\b(?:or|and|to|of|in|is|at|by)\b", "word", bare))
    is_formula = re.search(r"[\d\\+*/^=<>|]", plain_math(text)) is not None
    return frozenset("".join(runs)) if is_formula and all(len(run) <= 2 for run in runs) else frozenset()


# --- reading ----------------------------------------------------------------------------------------------------------


def _time_or_ratio(shape: str) -> Structure | None:
    if colon := _COLON.fullmatch(shape):
        meridiem = (colon[2] or "").lower().replace(".", "")
        return Structure("colon", tuple(re.split(r" ?: ?", colon[1])), meridiem)
    if hour := re.fullmatch(r"(\d{1,2}) ?([ap])\.?m\.?", shape, re.IGNORECASE):
        return Structure("colon", (hour[1], "00"), f"{hour[2].lower()}m")
    if ratio := _RATIO_WORDS.fullmatch(shape):
        return Structure("colon", (ratio[1], ratio[2]))
    if _BY.fullmatch(shape) and re.search(r"[xX]|by|por|mal|sur", shape):
        return Structure("by", tuple(re.findall(r"\d+(?:\.\d+)?", shape)))
    return None


def _solutions(shape: str) -> Structure | None:
    r"""Read ``x = 2 or x = 3``, ``x = \pm 3``, ``x = 2, y = 3``, ``x \in (0, 1)``."""
    assigned = _ASSIGNED.fullmatch(shape)
    if assigned is None:
        return _plus_minus(shape)
    name, rest = assigned[1], assigned[2]
    if inner := (_union(rest) or _bracketed(rest) or _plus_minus(rest)):
        return inner
    parts = _split(rest)
    if len(parts) < 2:
        return None
    named = [(name, parts[0])]
    for part in parts[1:]:
        more = _ASSIGNED.fullmatch(part)
        named.append((more[1], more[2]) if more else (name, part))
    if any(_RELATION.search(part) for _, part in named):
        return None
    if len({name for name, _ in named}) == 1:
        return Structure("set", tuple(part for _, part in named))
    if len({name for name, _ in named}) < len(named):
        return None
    named.sort()
    return Structure("values", tuple(part for _, part in named), " ".join(name for name, _ in named))


def _plus_minus(shape: str) -> Structure | None:
    if shape.count(r"\pm") != 1 or _RELATION.search(shape) or "," in shape:
        return None
    return Structure("set", tuple(shape.replace(r"\pm", sign, 1).removeprefix("+").strip() for sign in "+-"))


def _union(shape: str) -> Structure | None:
    parts = tuple(part.strip() for part in re.split(r"\\cup\b|(?<=[)\]])\s*U\s*(?=[(\[])", shape))
    return Structure("union", parts) if len(parts) > 1 else None


def _bracketed(shape: str) -> Structure | None:
    inner = shape
    if shape.startswith(r"\{") and shape.endswith(r"\}"):
        kind, inner = "set", shape[2:-2]
    elif shape.startswith(r"\langle") and shape.endswith(r"\rangle"):
        kind, inner = "<>", shape[7:-7]
    elif shape[:1] in ("(", "[", "]", "{") and shape[-1:] in (")", "]", "[", "}") and len(shape) > 2:
        left = {"]": "("}.get(shape[0], shape[0])
        right = {"[": ")"}.get(shape[-1], shape[-1])
        kind, inner = left + right, shape[1:-1]
        if kind == "{}":
            kind = "set"
    else:
        return None
    parts = _split(inner, words_too=False)
    if kind not in _ORDERED | {"set"} or (len(parts) < 2 and kind != "set"):
        return None
    return Structure(kind, tuple(parts))


def _listed(shape: str) -> Structure | None:
    """Read a list of numbers or formulas: ``1, 2 and 3``; of ``2 or 3`` the order is open. ``3,5`` is a number."""
    is_list = re.fullmatch(r"-?\d+(?:\.\d+)?(?:,-?\d+(?:\.\d+)?){2,}", shape) and not _GROUPED_NUMBER.fullmatch(shape)
    if not is_list and not re.search(rf", |;|\S\s*(?:{words('both')}|{words('alternative')})\s*\S", shape):
        return None
    parts = shape.split(",") if is_list else _split(shape)
    if len(parts) < 2 or not all(_is_part(part) for part in parts):
        return None
    is_open = re.search(words("alternative"), shape) is not None
    return Structure("set", tuple(parts), "or") if is_open else Structure("list", tuple(parts))


def _is_part(text: str) -> bool:
    if read_quantity(text):
        return True
    return _bracketed(text) is not None or (is_expression(text) and not re.fullmatch(r"[A-Za-z]+", text))


def _relation(shape: str) -> Structure | None:
    sides = _RELATION.split(shape)
    if len(sides) < 3 or not all(side.strip() for side in sides):
        return None
    return Structure("relation", tuple(side.strip() for side in sides[::2]), " ".join(sides[1::2]))


def _split(text: str, *, words_too: bool = True) -> list[str]:
    """Split at the commas, or the semicolons if there are any, that stand in no bracket; also at "and" and "or"."""
    depth, start, parts = 0, 0, []
    separators = _JOINTS if words_too else re.compile(r"\s*;\s*" if ";" in text else r"\s*,\s*")
    position = 0
    while position < len(text):
        joint = separators.match(text, position) if depth == 0 and position else None
        if (
            joint
            and joint.group()
            and not (
                words_too
                and joint.group() == ","
                and text[joint.end() : joint.end() + 1].isdigit()
                and text[joint.start() - 1].isdigit()
                and "=" not in text
            )
        ):
            parts.append(text[start : joint.start()])
            start = position = joint.end()
            continue
        depth += (text[position] in _OPEN) - (text[position] in _CLOSE)
        position += 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


# --- comparing --------------------------------------------------------------------------------------------------------


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    found = set(verdicts)
    return False if False in found else None if None in found else True


def _same_members(answer: Sequence[str], truth: Sequence[str]) -> bool | None:
    """Return whether every part of one is a part of the other, in any order."""
    table = [[same_value(one, other) for other in truth] for one in answer]
    rows = [*table, *map(list, zip(*table, strict=True))]
    return _all(True if True in row else None if None in row else False for row in rows)


def _same_colon(answer: Structure, truth: Structure) -> bool | None:
    one, other = ([Fraction(part) for part in structure.parts] for structure in (answer, truth))
    if answer.note and truth.note and answer.note != truth.note:
        return False
    if answer.note != truth.note:
        afternoon = "pm" in (answer.note, truth.note)
        hour = 12 if afternoon else 0
        noted, plain = (one, other) if answer.note else (other, one)
        if plain == [noted[0] % 12 + hour, *noted[1:]] and (afternoon or plain[0] == 0):
            return True
        return None if noted == plain or [noted[0] % 12 + hour, *noted[1:]] == plain else False
    if one == other:
        return True
    if len(one) != len(other):
        shorter, longer = sorted((one, other), key=len)
        return None if longer[: len(shorter)] == shorter and not any(longer[len(shorter) :]) else False
    is_multiple = all(a * other[0] == b * one[0] for a, b in zip(one, other, strict=True))
    return None if is_multiple else False


def _range(relation: Structure) -> Structure | None:
    """Return the interval that ``0 <= x < 5`` or ``x > 3`` is; None if it is none."""
    signs, sides = relation.note.split(), list(relation.parts)
    if all(sign in ("<", "<=", ">", ">=") for sign in signs) and len(signs) <= 2:
        if signs[0][0] == ">":
            sides, signs = sides[::-1], [_FLIPPED[sign] for sign in reversed(signs)]
        if len(sides) == 2:
            is_upper = re.fullmatch("[A-Za-z]", sides[0]) is not None
            sides, signs = ([r"-\infty", *sides], ["<", *signs]) if is_upper else ([*sides, r"\infty"], [*signs, "<"])
        if re.fullmatch("[A-Za-z]", sides[1]) and all(sign[0] == "<" for sign in signs):
            kind = ("[" if signs[0] == "<=" else "(") + ("]" if signs[1] == "<=" else ")")
            return Structure(kind, (sides[0], sides[2]))
    return None


def _same_relation(answer: Structure, truth: Structure) -> bool | None:
    """Compare equations and inequalities side by side, also when the sides are swapped."""
    direct = answer.note == truth.note and len(answer.parts) == len(truth.parts)
    flipped = " ".join(_FLIPPED[sign] for sign in reversed(answer.note.split())) == truth.note
    ways = []
    if direct:
        ways.append(_all(map(same_value, answer.parts, truth.parts)))
    if flipped:
        ways.append(_all(map(same_value, reversed(answer.parts), truth.parts)))
    if True in ways:
        return True
    is_solved = re.fullmatch("[A-Za-z]", truth.parts[0]) is not None and answer.parts[0] == truth.parts[0]
    # Otherwise another way to write it, or another equation.
    return False if is_solved and direct and ways[0] is False else None
