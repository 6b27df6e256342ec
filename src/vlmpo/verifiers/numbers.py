"""Reads quantities as people and models write them: 1,234.5; 45 %; 3/4; 1.5 × 10³; $3.2 million; twenty-one; ٣."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from vlmpo.verifiers.characters import plain_math
from vlmpo.verifiers.formula import FormulaError, read_formula, same_formula
from vlmpo.verifiers.languages import EAST_ASIAN, LETTERS, word_set, words
from vlmpo.verifiers.sentences import is_sentence, tidy
from vlmpo.verifiers.units import PERCENT, UNITS
from vlmpo.verifiers.vocabulary import COUNTERS, MAGNITUDES, NUMBERS, OTHER_LANGUAGES

_MOST_CHARACTERS, _MOST_DIGITS, _MOST_EXPONENT = 200, 60, 300


@dataclass(frozen=True, slots=True)
class Quantity:
    """Holds a number with its unit.

    Attributes:
        value: exact, with magnitude words multiplied in; of a percentage the number before the sign, 45 for ``45 %``.
        percent: whether a percent sign or word follows.
        unit: kind of the unit ("length", "USD"); None if there is none or an unknown one.
        scale: the unit in base units of its kind.
        digits: whether it is written in plain digits alone, as years are.
        noun: the words after the number, if they are no unit: "red circles".
        variable: the left side of an equation: "x" of ``x = 3``.
        otherwise: the value if the one point or comma in it means the other thing, as it does in some languages:
            1234 for ``1.234``.
    """

    value: Fraction
    percent: bool = False
    unit: str | None = None
    scale: Fraction = Fraction(1)
    digits: bool = False
    noun: str = ""
    variable: str = ""
    otherwise: Fraction | None = None

    @property
    def is_whole(self) -> bool:
        return self.value.denominator == 1


_MAGNITUDES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "mn": 10**6, "billion": 10**9, "bn": 10**9,
    "trillion": 10**12, "tn": 10**12, "lakh": 10**5, "crore": 10**7, "dozen": 12,
} | MAGNITUDES  # fmt: skip
# Only right after the digits: "300 K" may be kelvin.
_ATTACHED_MAGNITUDES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_THOUSANDS = ("thousand", "million", "billion")
NUMBER_WORDS = {"none": 0} | {w: i for i, w in enumerate(_ONES)} | {w: 20 + 10 * i for i, w in enumerate(_TENS)}
# Words that turn the number before them into another number or none.
_NO_UNIT = word_set(
    "or and not no nor but than to of less more fewer over under minus plus times squared cubed half halves "
    "third thirds quarter quarters fifth fifths tenth tenths hundredth hundredths thousandth thousandths "
    "either neither maybe possibly perhaps if unless except point negative positive up down sqrt pi factorial "
    "twice double doubled triple grand recurring repeating bar minimum maximum each besides apart ignoring excluding "
    "excluded without onwards off nought hypothetically below above score root choose mod base remainder"
)
_NO_NAME = re.compile(rf"\w*[^r\W]ths?|\w*fold|(?:ten|dozen|hundred|thousand|million|billion)s|r\d|{words('fault')}")
# In a parenthesis after a number it takes it back or makes it another: "3 (or 4)". Others explain: "3 (two red)".
_OTHERWISE = re.compile(
    rf"\b(?:or|not|maybe|possibly|perhaps|if|with|without|including|excluding|actually|plus|minus|negative|below"
    rf"|thousands?|millions?|billions?|hundreds?|dozens?|base|approximate\w*|estimate\w*)\b|{words('fault')}"
)
_ASIDE = re.compile(r"\s*\(([^()]*)\)\s*[.,]?$")
_WORD = re.compile(
    rf"(?![\d_])[{LETTERS}{EAST_ASIAN}][{LETTERS}{EAST_ASIAN}'.-]*(?:[/^]\w[\w-]*)*"
    r"|[°$€£¥₹][^\W\d_]?|/[^\W\d_]+"
)
_EAST_ASIAN = re.compile(f"[{EAST_ASIAN}]")
_LIMITS = re.compile(
    rf"{words('alternative', 'both', 'condition', 'but', 'contrast')}|(?<![{LETTERS}])(?:menos|más|mais|mehr|weniger"
    r"|als|plus|moins|больше|меньше|более|менее|medi[oa]|demie?|halb\w*|fois|mal|veces|vezes|раза?)"
    rf"(?![{LETTERS}])|以上|以下|倍|半|分之"
)
# Parts of words for thousands and millions in languages that are not read.
_OTHER_MAGNITUDE = re.compile("mil[ijlay]|tys|tis[ií]|tus|duiz|bin$|ribu|juta|cent[oi]|hund|nghìn|triệu")
# After a number and its counter: another number, "more", "less", "before", "half past".
_OTHER_COUNT = re.compile("^点|[〇零一二两兩三四五六七八九十百千半多少减減加除中前后後错錯]")
_INLINE = re.compile(r"(?<!\\)\$((?=\S)[^$]*[^$\s])\$(?!\d)")
_NO_LEAD = word_set("not no never neither nor if unless than least most between cannot can't isn't aren't or")
# Left out at the beginning: how close is close enough is the verifier's matter.
_APPROXIMATE = re.compile(rf"(?:(?:{words('about')}|≈|~|=)\s*)+", re.IGNORECASE)
_LEAD = re.compile(
    r"(?P<lead>(?:[A-Za-z][A-Za-z'’-]*\s+){1,12}?)(?:is|are|was|were|has|have|shows|contains):?\s+(?=\S)"
)
_EAST_ASIAN_MAGNITUDE = re.compile(
    rf"\s*({'|'.join(sorted(filter(_EAST_ASIAN.match, MAGNITUDES), key=len, reverse=True))})"
)
_RAISED_UNIT = re.compile(
    r"(?:(?P<square>square |sq\.? |平方|кв\. ?)|(?P<cube>cubic |立方|куб\. ?))?"
    r"(?P<name>[^\s^\d]+)(?:\^?(?P<digit>\{?[23]\}?)|(?: squared)|)"
)
_CURRENCY = r"(?:R\$|US\$|USD|EUR|GBP|INR|JPY|[$€£¥₹])"
_PLAIN = r"(?:\d+(?:\.\d*)?|\.\d+)"
_GROUPED = r"\d[\d.,' ]*\d(?!\d)|\.?\d+\.?"
_SIGNED = re.compile(
    rf"(?P<sign>[+-]|minus |negative )?\s*(?P<currency>{_CURRENCY})?\s*(?P<sign2>[+-])?\s*", re.IGNORECASE
)
_FORMS = [
    re.compile(r"(?P<whole>\d+)\s+(?P<top>\d+)\s*/\s*(?P<bottom>\d+)(?![\d/.])"),
    re.compile(rf"(?P<top>{_PLAIN})\s*/\s*(?P<bottom>{_PLAIN})(?![\d/.])"),
    re.compile(rf"(?P<number>{_PLAIN})\s*(?:[xX*]\s*10\s*\^|[eE])\s*[({{]?\s*(?P<exponent>[+-]?\d+)\s*[)}}]?(?!\w)"),
    re.compile(r"(?P<number>)10\s*\^\s*[({]?\s*(?P<exponent>[+-]?\d+)\s*[)}]?(?!\w)"),
    re.compile(rf"(?P<number>{_GROUPED})"),
]
_GROUPINGS = [
    (re.compile(r"(?:\d+\.?\d*|\.\d+)"), "", "."),
    (re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?"), ",", "."),
    (re.compile(r"[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?"), ",", "."),  # 12,34,567: lakhs and crores
    (re.compile(r"[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?"), " ", "."),
    (re.compile(r"[1-9]\d{0,2}(?: \d{3})+,\d+"), " ", ","),
    (re.compile(r"[1-9]\d{0,2}(?:'\d{3})+(?:\.\d+)?"), "'", "."),
    (re.compile(r"[1-9]\d{0,2}(?:\.\d{3})+,\d+"), ".", ","),
    (re.compile(r"[1-9]\d{0,2}(?:\.\d{3}){2,}"), ".", ","),
    (re.compile(r"\d+,\d{1,2}|0,\d+"), "", ","),  # a decimal comma; 1,234 is a thousand
]  # fmt: skip


@lru_cache(maxsize=1024)
def read_quantity(text: str) -> Quantity | None:
    """Return the one quantity that ``text`` states; None if it states none, several, a range, a bound or a denial.

    Understood are the usual thousands separators, a decimal comma, percent, fractions and mixed numbers, scientific
    notation, number words, digits of any script, currency, magnitudes (``3.5M``, ``2 billion``), a unit or a few plain
    words after the number, "about", "There are ...", and what follows the last ``=``.
    """
    if len(text) > _MOST_CHARACTERS:
        return None
    equation = _equation(_ascii(tidy(text)))
    if equation is None or not equation[1]:
        return None
    name, side = equation
    quantity = _stated(_without_about(side))
    lead = _LEAD.match(side)
    if quantity is None and lead and not _NO_LEAD & set(lead["lead"].lower().split()):
        quantity = _stated(_without_about(side[lead.end() :]))
    return replace(quantity, variable=name) if quantity and name else quantity


def _ascii(text: str) -> str:
    """Write LaTeX, other scripts' digits, superscripts and vulgar fractions in plain characters."""
    text = plain_math(_INLINE.sub(r"\1", text))
    text = re.sub(r"\\frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}", r" \1/\2", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r" \1/\2", text)
    return " ".join(text.replace(r"\approx", "≈").split())


def _without_about(text: str) -> str:
    about = _APPROXIMATE.match(text)
    return text[about.end() :] if about else text


def _equation(text: str) -> tuple[str, str] | None:
    """Return the variable ("" if there is none) and the right side of an equation; None if there are several."""
    equation = re.fullmatch(r"(.*)[=≈](.*)", text, re.DOTALL)
    if not equation or not equation[1].strip():
        return "", text
    left = equation[1].strip()
    if (
        left[-1] in "<>!~"
        or re.search(r"[,;]\s|\b(?:and|or|not|if)\b|[≠≤≥<>]|\\in\b", left)
        or _LIMITS.search(left.lower())
    ):
        return None
    if equation[0].count("=") and _is_unequal(left, equation[2]):
        return None
    name = re.fullmatch(r"(?:m ?)?(?:\\angle|∠) ?[A-Z]{1,3}|[A-Za-z]", left)
    return name.group().replace("\\angle", "∠").replace(" ", "") if name else "", equation[2].strip()


def _is_unequal(left: str, right: str) -> bool:
    """Return whether numbers stand on the left that are not the right side: "2 = 5"."""
    if not re.fullmatch(r"[\d\s.+*/^()-]+", left):
        return False
    try:
        return same_formula(read_formula(left), read_formula(right)) is not True
    except FormulaError:
        return False  # "3 + 3 = 6 cars"


def _stated(text: str) -> Quantity | None:
    """Read a quantity that begins where ``text`` does and is followed by nothing but its unit."""
    if text.startswith("(") and text.endswith(")") and not re.search("[(,;]", text[1:]):  # (12,5) is no 12.5
        text = text[1:-1].strip()
    signed = _SIGNED.match(text)
    assert signed is not None  # every part of it is optional
    if signed["sign"] and signed["sign2"]:
        return None
    sign = -1 if (signed["sign"] or signed["sign2"] or "+")[0].lower() in "-mn" else 1
    body = text[signed.end() :]
    for form in _FORMS:
        match = form.match(body)
        if match and (value := _value(match.groupdict())) is not None:
            rest = body[match.end() :]
            digits = match.group().isdigit() and not rest.strip() and not signed.group().strip()
            quantity = _with_unit(sign * value, rest, signed["currency"], digits)
            return quantity and replace(quantity, otherwise=_otherwise(match.group(), value, quantity))
    value, rest = _spelled(body)
    return None if value is None else _with_unit(sign * value, rest, signed["currency"], digits=False)


def _value(parts: dict[str, str]) -> Fraction | None:
    if any(len(part) > _MOST_DIGITS for part in parts.values()):
        return None
    if "bottom" in parts:
        bottom = Fraction(parts["bottom"])
        return Fraction(parts.get("whole", "0")) + Fraction(parts["top"]) / bottom if bottom else None
    number = Fraction(1) if parts["number"] == "" else _grouped(parts["number"])
    exponent = int(parts.get("exponent", "0"))
    if number is None or abs(exponent) > _MOST_EXPONENT:
        return None
    return number * Fraction(10) ** exponent


def _grouped(text: str) -> Fraction | None:
    for pattern, group, point in _GROUPINGS:
        if pattern.fullmatch(text):
            return Fraction(text.replace(group, "").replace(point, "."))
    return None


def _spelled(text: str) -> tuple[Fraction | None, str]:
    """Return the number that the first words of ``text`` spell, and the text after them."""
    text = re.sub(r"(?i)\bhundred and (?=(\w+))", lambda m: "hundred " if m[1].lower() in NUMBER_WORDS else m[0], text)
    foreign = re.match(r"[〇零一二两兩三四五六七八九十]+|[^\W\d_]+", text)
    if foreign and foreign.group().lower() in NUMBERS:
        return Fraction(NUMBERS[foreign.group().lower()]), text[foreign.end() :]
    total = current = end = 0
    last = ""
    for match in re.finditer(r"[A-Za-z]+", text):
        word, between = match.group().lower(), text[end : match.start()]
        if between.strip(" -") or (end and not between):
            break
        if word in NUMBER_WORDS and (last not in NUMBER_WORDS or (last in _TENS and 0 < NUMBER_WORDS[word] < 10)):
            current += NUMBER_WORDS[word]
        elif word == "hundred" and last in NUMBER_WORDS:
            current *= 100
        elif word in _THOUSANDS and last and last not in _THOUSANDS:
            total, current = total + current * _MAGNITUDES[word], 0
        else:
            break
        end, last = match.end(), word
    return (Fraction(total + current), text[end:]) if last else (None, text)


def _otherwise(number: str, value: Fraction, quantity: Quantity) -> Fraction | None:
    """Return the value with the one point or comma before three digits read as the other sign."""
    if not re.fullmatch(r"[1-9]\d{0,2}[.,]\d{3}", number):
        return None
    return quantity.value * (1000 if "." in number else Fraction(1, 1000))


def _with_unit(value: Fraction, rest: str, currency: str | None, digits: bool) -> Quantity | None:
    kind, scale = UNITS[currency.lower()] if currency else (None, Fraction(1))
    if aside := _ASIDE.search(rest):
        if _OTHERWISE.search(aside[1].lower()) or _is_other_number(value, aside[1], rest):
            return None
        rest = rest[: aside.start()]
    if rest[:1] in _ATTACHED_MAGNITUDES and not rest[1:2].isalnum():
        value, rest = value * _ATTACHED_MAGNITUDES[rest[0]], rest[1:]
    while magnitude := _EAST_ASIAN_MAGNITUDE.match(rest):
        value, rest = value * MAGNITUDES[magnitude[1]], rest[magnitude.end() :]
    rest = re.sub(r"^\s*%", " % ", re.sub(r"^\s*(?:per cent|por ciento|por cento|pour cent)\b", " percent", rest))
    if rest.lstrip().startswith("..") or (rest == "s" and value % 10 == 0 and value >= 1000):  # 0.333..., the 1990s
        return None
    names = rest.strip().rstrip(".,;。").split()
    while names and names[0].lower() in _MAGNITUDES:
        value *= _MAGNITUDES[names.pop(0).lower()]
    percent = bool(names) and names[0].lower() in PERCENT
    if percent:
        names = names[2:] if names[1:2] == ["of"] else names[1:]
    known = known_unit(" ".join(names))
    if known and kind and known[0] != kind:  # $3 cm
        return None
    if known:
        return Quantity(value, percent, *known, digits)
    is_plain = are_plain(names) and (percent or _is_apart(rest))
    return Quantity(value, percent, kind, scale, digits, " ".join(names).lower()) if is_plain else None


def _is_other_number(value: Fraction, aside: str, rest: str) -> bool:
    """Return whether a parenthesis gives another number: "3 (4)", "3 (six in all)"; 1.23(4) is one with its error."""
    number = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?|[a-z]+)(?:\s*%|\s+(?:in|with|when)\b.*)?\s*", aside.lower())
    if number is None or not (number[1] in NUMBER_WORDS or number[1][-1].isdigit()):
        return False
    return rest[:1] == "(" or Fraction(NUMBER_WORDS.get(number[1], number[1])) != value


def _is_apart(rest: str) -> bool:
    """Return whether the words after a number are no suffix of it, as in 21st, 3x, 3ème and 3割."""
    if counter := re.match(rf"\s*(?:{COUNTERS})", rest):
        is_other = rest.strip() != "点" and _OTHER_COUNT.search(rest.strip())
        return not is_other and all(_EAST_ASIAN.match(sign) or sign == " " for sign in rest[counter.end() :])
    return not rest.strip() or (
        rest[0] in " °/" and not _EAST_ASIAN.match(rest.strip()) and not re.match(r"\s+[^\W\d_]{1,2}(?![\w/^])", rest)
    )


def known_unit(name: str) -> tuple[str, Fraction] | None:
    """Look a unit up, also its square or cube; a short one must have the right case: ``m`` is a metre, ``M`` is not."""
    if found := _plain_unit(name):
        return found
    raised = _RAISED_UNIT.fullmatch(name)
    unit = _plain_unit(raised["name"]) if raised else None
    if raised is None or unit is None:
        return None
    power = 3 if raised["cube"] or "3" in (raised["digit"] or "") else 2
    return f"{unit[0]}^{power}", unit[1] ** power


def _plain_unit(name: str) -> tuple[str, Fraction] | None:
    return UNITS.get(name) or (UNITS.get(name.lower()) if len(name) > 2 or name[:1] == "°" else None)


def are_plain(names: list[str]) -> bool:
    """Return whether these are a few words, or a unit such as km/h, that leave the value before them as it is."""
    plain = [name.lower().strip(".,") for name in names]
    if len(plain) > 5 or names[:1] in [["K"], ["k"], ["M"], ["B"]]:  # "5 M": a magnitude or a unit?
        return False
    if _LIMITS.search(" ".join(plain)) or OTHER_LANGUAGES & set(plain) or any(map(_OTHER_MAGNITUDE.match, plain)):
        return False
    if is_sentence(" ".join(filter(str.isascii, plain))):
        return False
    others = _NO_UNIT | NUMBER_WORDS.keys()
    return all(_WORD.fullmatch(name) and name not in others and not _NO_NAME.fullmatch(name) for name in plain)
