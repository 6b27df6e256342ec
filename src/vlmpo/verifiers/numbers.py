"""Reads quantities as people and models write them: 1,234.5; 45 %; 3/4; 1.5 × 10³; $3.2 million; twenty-one; ٣."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from vlmpo.verifiers.answer import tidy, unwrap_latex, word_set

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
    """

    value: Fraction
    percent: bool = False
    unit: str | None = None
    scale: Fraction = Fraction(1)
    digits: bool = False

    @property
    def is_whole(self) -> bool:
        return self.value.denominator == 1


_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (kind, Fraction(scale))
    for kind, scale, names in [
        ("length", "1/1000", "mm millimeter millimeters millimetre millimetres"),
        ("length", "1/100", "cm centimeter centimeters centimetre centimetres"),
        ("length", "1", "m meter meters metre metres"),
        ("length", "1000", "km kilometer kilometers kilometre kilometres"),
        ("length", "0.0254", "inch inches"),
        ("length", "0.3048", "ft foot feet"),
        ("mass", "1/1000", "mg milligram milligrams"),
        ("mass", "1", "g gram grams"),
        ("mass", "1000", "kg kilogram kilograms"),
        ("time", "1/1000", "ms millisecond milliseconds"),
        ("time", "1", "s sec second seconds"),
        ("time", "60", "min minute minutes"),
        ("time", "3600", "h hr hour hours"),
        ("angle", "1", "° degree degrees deg"),
        ("USD", "1", "$ usd us$ dollar dollars"),
        ("EUR", "1", "€ eur euro euros"),
        ("GBP", "1", "£ gbp pound pounds"),
        ("JPY", "1", "¥ jpy yen"),
        ("INR", "1", "₹ inr rupee rupees"),
    ]
    for name in names.split()
}
_PERCENT = frozenset({"%", "percent", "pct", "percentage"})
_MAGNITUDES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "mn": 10**6, "billion": 10**9, "bn": 10**9,
    "trillion": 10**12, "tn": 10**12, "lakh": 10**5, "crore": 10**7, "dozen": 12,
}  # fmt: skip
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
    "either neither maybe possibly perhaps if unless except point negative positive up down sqrt pi"
)
# Words that, in a parenthesis after a number, take it back: "3 (or 4)". Others explain: "3 (two red, one blue)".
_OTHERWISE = word_set("or not maybe possibly perhaps if with without including excluding actually")
_ASIDE = re.compile(r"\s*\(([^()]*)\)\s*[.,]?$")
_WORD = re.compile(r"[^\W\d_][\w'.-]*(?:[/^][^\W\d_]?[\w^-]*)*|[°$€£¥₹][^\W\d_]?|/[^\W\d_]+")
_NO_LEAD = word_set("not no never neither nor if unless than least most between cannot can't isn't aren't or")
# Left out at the beginning: how close is close enough is the verifier's matter.
_APPROXIMATE = re.compile(
    r"^(?:(?:about|approximately|approx\.?|around|roughly|nearly|almost|circa|ca\.|exactly|only|just|a total of|"
    r"equal to|equals|≈|~|=)\s*)+",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?P<lead>(?:[A-Za-z][A-Za-z'’-]*\s+){1,12}?)(?:is|are|was|were|has|have|shows|contains):?\s+(?=\S)"
)
_CURRENCY = r"(?:US\$|USD|EUR|GBP|INR|JPY|[$€£¥₹])"
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


def read_quantity(text: str) -> Quantity | None:
    """Return the one quantity that ``text`` states; None if it states none, several, a range, a bound or a denial.

    Understood are the usual thousands separators, a decimal comma, percent, fractions and mixed numbers, scientific
    notation, number words, digits of any script, currency, magnitudes (``3.5M``, ``2 billion``), a unit or a few plain
    words after the number, "about", "There are ...", and what follows the last ``=``.
    """
    side = _after_equals(_ascii(tidy(text))) if len(text) <= _MOST_CHARACTERS else None
    if not side:
        return None
    quantity = _stated(_APPROXIMATE.sub("", side))
    lead = _LEAD.match(side)
    if quantity is None and lead and not _NO_LEAD & set(lead["lead"].lower().replace("’", "'").split()):
        quantity = _stated(_APPROXIMATE.sub("", side[lead.end() :]))
    return quantity


def _ascii(text: str) -> str:
    """Write LaTeX, other scripts' digits, superscripts and vulgar fractions in plain characters."""
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda m: "^" + unicodedata.normalize("NFKC", m.group()), text)
    text = "".join(
        f" {unicodedata.normalize('NFKC', c)} " if unicodedata.decomposition(c).startswith("<fraction>") else c
        for c in text
    )
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/").replace("٫", ".").replace("٬", ",")
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    text = re.sub("[−–—‒﹣]", "-", text).replace("’", "'").replace("٪", "%")
    text = re.sub(r"\\[dtc]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}", r" \1/\2", text)
    text = re.sub(r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", "°", text)
    text = re.sub(r"\\(?:times|cdot|ast)\b|×|·|⋅|∗", "*", text).replace(r"\approx", "≈")
    text = unwrap_latex(text)
    text = re.sub(r"\\([%$])", r"\1", text.replace("{,}", ","))
    text = re.sub(r"\\[,;:! ]|(?<=\d)~", " ", text)
    return " ".join(text.split())


def _after_equals(text: str) -> str | None:
    """Return the right side of an equation, or ``text`` if it is none; None if there are several, or a bound."""
    equation = re.fullmatch(r"(.*)[=≈](.*)", text, re.DOTALL)
    if not equation or not equation[1].strip():
        return text
    if equation[1][-1] in "<>!~" or re.search(r"[,;]\s|\b(?:and|or|not|if)\b|[≠≤≥<>]", equation[1]):
        return None
    return equation[2].strip()


def _stated(text: str) -> Quantity | None:
    """Read a quantity that begins where ``text`` does and is followed by nothing but its unit."""
    if text.startswith("(") and text.endswith(")") and "(" not in text[1:]:
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
            return _with_unit(sign * value, rest, signed["currency"], digits)
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


def _with_unit(value: Fraction, rest: str, currency: str | None, digits: bool) -> Quantity | None:
    kind, scale = _UNITS[currency.lower()] if currency else (None, Fraction(1))
    if aside := _ASIDE.search(rest):
        if _OTHERWISE & set(re.findall(r"\w+", aside[1].lower())):
            return None
        rest = rest[: aside.start()]
    if rest[:1] in _ATTACHED_MAGNITUDES and not rest[1:2].isalnum():
        value, rest = value * _ATTACHED_MAGNITUDES[rest[0]], rest[1:]
    rest = re.sub(r"^\s*%", " % ", rest.replace("per cent", "percent"))
    words = rest.strip().rstrip(".,;").split()
    while words and words[0].lower() in _MAGNITUDES:
        value *= _MAGNITUDES[words.pop(0).lower()]
    percent = bool(words) and words[0].lower() in _PERCENT
    if percent:
        words = words[2:] if words[1:2] == ["of"] else words[1:]
    known = _known_unit(words[0]) if len(words) == 1 else None
    if not known and words and re.match(r"[^\W\d_]{1,2}(?![\w/^])", rest):  # 3x, 21st: a product, an ordinal
        return None
    if known:
        kind, scale = known
    elif not _plain_words(words):
        return None
    return Quantity(value, percent, kind, scale, digits)


def _known_unit(word: str) -> tuple[str, Fraction] | None:
    """Look a unit up; a short one must have the right case: ``m`` is a metre, ``M`` is not."""
    return _UNITS.get(word) or (_UNITS.get(word.lower()) if len(word) > 2 else None)


def _plain_words(words: list[str]) -> bool:
    """Return whether these are a few words, or a unit such as km/h, that leave the number before them as it is."""
    plain = [word.lower().strip(".,") for word in words]
    if len(plain) > 5 or words[:1] in [["K"], ["k"], ["M"], ["B"]]:  # "5 M": a magnitude or a unit?
        return False
    return all(_WORD.fullmatch(word) and word not in _NO_UNIT and word not in NUMBER_WORDS for word in plain)
