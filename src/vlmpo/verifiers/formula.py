r"""Reads formulas whole, and tells whether two are equal by working them out.

A formula of which anything is left over is not read: ``3\sqrt5`` is never taken for 3. Two formulas are equal if they
have the same value, to 50 digits, wherever their variables are put.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmpo.verifiers.characters import plain_math
from vlmpo.verifiers.languages import word_set

_LONGEST = 300
_MOST_EXPONENT, _MOST_FACTORIAL, _MOST_NESTING = 10_000, 1000, 60
# Where the variables are put: positive, and of either sign.
_POINTS = ((0.7310, 0.2918), (1.3717, 0.4133), (-0.8713, 0.6171), (0.5137, -1.1931))

Variables = Mapping[str, Any]
Value = Callable[[Variables], Any]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<command>\\log_(?:\d|\{\d+\})|\\[A-Za-z]+)|(?P<word>[A-Za-z]+(?:_(?:\w|\{\w+\}))?)"
    r"|(?P<sign>\*\*|[-+*/^!(){}\[\]|,°%]))"
)
_CONSTANTS = {r"\pi": "pi", "pi": "pi", "e": "e", r"\infty": "inf", r"\inf": "inf", "i": "j"}
_GREEK = {rf"\{name}" for name in word_set("alpha beta gamma delta theta lambda mu phi varphi omega rho sigma tau")}
_FUNCTIONS = {name: name for name in word_set("sin cos tan cot sec csc sinh cosh tanh exp sqrt abs")} | {
    "ln": "log",
    "log": "log10",
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
}


class FormulaError(Exception):
    """Says that a text is no formula, or one of which only a part can be read."""


@dataclass(frozen=True, slots=True)
class Formula:
    """Holds a formula: how its value is worked out, and the names of its variables."""

    value: Value
    variables: frozenset[str]


def read_formula(text: str, *, letters: frozenset[str] = frozenset()) -> Formula:
    """Read ``text`` as one expression, to its last character.

    Args:
        text: in LaTeX, Unicode or plain characters.
        letters: names of variables that may be written side by side, ``ab``, as a product.

    Raises:
        FormulaError: if a character is left over or unknown.
    """
    shape = plain_math(text)
    if len(shape) > _LONGEST:
        raise FormulaError(text)
    tokens, end = [], 0
    while end < len(shape.rstrip()):
        token = _TOKEN.match(shape, end)
        if token is None:
            raise FormulaError(text)
        tokens += _tokens_of(token, letters)
        end = token.end()
    reader = _Reader(tokens)
    value = reader.sum_of_terms()
    if reader.token:
        raise FormulaError(text)
    return Formula(value, frozenset(reader.variables))


def same_formula(one: Formula, other: Formula) -> bool | None:
    """Return whether two formulas are equal; None if that depends on where their variables are put."""
    import mpmath

    names = sorted(one.variables | other.variables)
    found = []
    with mpmath.workdps(50):
        for first, step in _POINTS if names else _POINTS[:1]:
            at = {name: mpmath.mpf(first) + mpmath.mpf(step) * (i + 1) / 7 for i, name in enumerate(names)}
            try:
                found.append(_same_value(one.value(at), other.value(at)))
            except (ArithmeticError, ValueError, TypeError, mpmath.libmp.NoConvergence, FormulaError):
                return None
    return found[0] if len(set(found)) == 1 else None


def _same_value(one: Any, other: Any) -> bool:
    import mpmath

    if mpmath.isnan(one) or mpmath.isnan(other):
        raise ArithmeticError
    if mpmath.isinf(one) or mpmath.isinf(other):
        return bool(one == other)
    return bool(abs(one - other) <= mpmath.mpf(10) ** -35 * max(abs(one), abs(other), mpmath.mpf(10) ** -10))


def _tokens_of(token: re.Match[str], letters: frozenset[str]) -> list[str]:
    """Return a token, or the letters of a product such as ``xy``; a word is none."""
    text = token.group().strip()
    if token["word"] is None or len(text) == 1 or "_" in text or text in _FUNCTIONS or text in ("pi", "inf"):
        return [text]
    if set(text) <= letters:
        return list(text)
    raise FormulaError(text)


class _Reader:
    """Reads tokens into a value, one level of precedence a method."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.variables: set[str] = set()

    @property
    def token(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.token
        if not token or (expected and token not in expected):
            raise FormulaError(token)
        self.at += 1
        return token

    def sum_of_terms(self) -> Value:
        self.depth += 1
        if self.depth > _MOST_NESTING:
            raise FormulaError("nested too deeply")
        value = self.term()
        while self.token in ("+", "-"):
            sign, left, right = self.take(), value, self.term()
            value = _added(left, right) if sign == "+" else _subtracted(left, right)
        self.depth -= 1
        return value

    def term(self) -> Value:
        value, divided = self.factor(), False
        while True:
            before = self.tokens[self.at - 1]
            if self.token in ("*", "/"):
                divided = self.take() == "/"
                value = _divided(value, self.factor()) if divided else _multiplied(value, self.factor())
            elif self._begins_factor():
                # 1/2x is (1/2)x to some and 1/(2x) to others; 3 4 and 2\frac12 are no products.
                if divided or (before[-1].isdigit() and (self.token[0] in "0123456789." or self.token == r"\frac")):
                    raise FormulaError(self.token)
                value = _multiplied(value, self.power())
            else:
                return value

    def factor(self) -> Value:
        if self.token in ("+", "-"):
            sign, value = self.take(), self.factor()
            return value if sign == "+" else lambda at: -value(at)
        return self.power()

    def power(self) -> Value:
        base = self.postfix()
        if self.token not in ("^", "**"):
            return base
        self.take()
        exponent = self.factor() if self.token == "-" else self.argument_of_power()
        if self.token in ("^", "**"):
            raise FormulaError("a tower of powers")
        return _raised(base, exponent)

    def argument_of_power(self) -> Value:
        return self.group() if self.token == "{" else self.postfix()

    def postfix(self) -> Value:
        value = self.atom()
        while self.token in ("!", "°", "%"):
            value = _POSTFIX[self.take()](value)
        return value

    def atom(self) -> Value:
        token = self.take()
        name = token.lstrip("\\")
        if token[0].isdigit() or token[0] == ".":
            return lambda at: _number(token)
        if token in _CONSTANTS:
            return lambda at: _constant(token)
        if token in "([{|":
            value = self.sum_of_terms()
            self.take({"(": ")", "[": "]", "{": "}", "|": "|"}[token])
            return value if token != "|" else lambda at: abs(value(at))
        if name == "frac":
            top, bottom = self.argument(), self.argument()
            return _divided(top, bottom)
        if name == "sqrt":
            return self.root()
        if name in _FUNCTIONS:
            return self.function(name)
        if base := re.fullmatch(r"log_\{?(\d+)\}?", name):
            return _divided(_applied("log", self.function_argument()), _applied("log", lambda at: _number(base[1])))
        if name == "binom":
            return _chosen(self.argument(), self.argument())
        if token in _GREEK or re.fullmatch(r"[A-Za-z](?:_(?:\w|\{\w+\}))?", token):
            self.variables.add(token)
            return lambda at: at[token]
        raise FormulaError(token)

    def group(self) -> Value:
        self.take("{")
        value = self.sum_of_terms()
        self.take("}")
        return value

    def argument(self) -> Value:
        r"""Read what follows ``\frac``: a group, or the next digit of ``\frac12``."""
        if self.token == "{":
            return self.group()
        token = self.token
        if token.isdigit() and len(token) > 1:  # \frac12: the digits are one token
            self.tokens[self.at] = token[1:]
            return lambda at: _number(token[0])
        return self.atom()

    def root(self) -> Value:
        degree = None
        if self.token == "[":
            self.take()
            degree = self.sum_of_terms()
            self.take("]")
        value = self.group() if self.token == "{" else self.atom()
        return _root(value, degree)

    def function(self, name: str) -> Value:
        exponent = None
        if self.token == "^":
            self.take()
            exponent = self.group() if self.token == "{" else self.atom()
            if self.tokens[self.at - 1] in ("}", "1"):  # sin^{-1} may be an inverse
                raise FormulaError(name)
        value = _applied(_FUNCTIONS[name], self.function_argument())
        return value if exponent is None else _raised(value, exponent)

    def function_argument(self) -> Value:
        r"""Read what a function is applied to: a bracket, or the product after it, as in ``\sin 2x``."""
        if self.token in ("(", "{", "["):
            return self.power()
        value = self.power()
        while self._begins_factor() and self.token not in ("(", "[", "|") and self.token.lstrip("\\") not in _FUNCTIONS:
            value = _multiplied(value, self.power())
        return value

    def _begins_factor(self) -> bool:
        token = self.token
        return bool(token) and (token[0].isalnum() or token[0] in "\\." or token in ("(", "[", "{"))


def _added(one: Value, other: Value) -> Value:
    return lambda at: one(at) + other(at)


def _subtracted(one: Value, other: Value) -> Value:
    return lambda at: one(at) - other(at)


def _multiplied(one: Value, other: Value) -> Value:
    return lambda at: one(at) * other(at)


def _divided(one: Value, other: Value) -> Value:
    return lambda at: one(at) / other(at)


def _raised(base: Value, exponent: Value) -> Value:
    def value(at: Variables) -> Any:
        power = exponent(at)
        if abs(power) > _MOST_EXPONENT:
            raise FormulaError("an endless power")
        return base(at) ** power

    return value


def _root(value: Value, degree: Value | None) -> Value:
    import mpmath

    def root(at: Variables) -> Any:
        if degree is None:
            return mpmath.sqrt(value(at))
        inner, index = value(at), degree(at)
        is_odd = index == int(index.real) and int(index.real) % 2 == 1
        if is_odd and mpmath.im(inner) == 0 and mpmath.re(inner) < 0:
            return -mpmath.root(-inner, int(index))
        return inner ** (1 / index)

    return root


def _applied(name: str, argument: Value) -> Value:
    import mpmath

    function = abs if name == "abs" else getattr(mpmath, name)
    return lambda at: function(argument(at))


def _chosen(top: Value, bottom: Value) -> Value:
    import mpmath

    return lambda at: mpmath.binomial(top(at), bottom(at))


def _factorial(value: Value) -> Value:
    import mpmath

    def factorial(at: Variables) -> Any:
        number = value(at)
        if abs(number) > _MOST_FACTORIAL:
            raise FormulaError("an endless factorial")
        return mpmath.factorial(number)

    return factorial


def _number(text: str) -> Any:
    import mpmath

    return mpmath.mpf(text)


def _constant(name: str) -> Any:
    import mpmath

    return +getattr(mpmath, _CONSTANTS[name])


def _in_degrees(value: Value) -> Value:
    return lambda at: value(at) * _constant("pi") / 180


def _in_percent(value: Value) -> Value:
    return lambda at: value(at) / 100


_POSTFIX = {"!": _factorial, "°": _in_degrees, "%": _in_percent}
