"""Show the choices of a question to the model as lettered lines, and name its answer by their letters."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from vlmpo.data.formats.media import is_empty
from vlmpo.data.readers.json import WrittenNumber, decode_json_as_written
from vlmpo.data.records import checked_text, json_kind
from vlmpo.errors import RecordError, shorten

CHOICE_KEYS = ("choices", "options")

_LETTERED = re.compile(r"\(?([A-Za-z])(?:[.):\uFF1A\uFF0E\u3001\uFF09]|\uFF09)\s*(?=\S)")  # "A. ", "(a) ", "B: "


class Choice(NamedTuple):
    """Holds one choice: its letter, ``A`` to ``Z``, and its text."""

    letter: str
    text: str


def read_choices(record: Mapping[str, Any], origin: str) -> list[Choice]:
    """Return the choices under ``choices`` or ``options``; none if there are none.

    They are a list of texts and numbers, an object of letters and texts, or a text that holds such a list.

    Raises:
        RecordError: ``ambiguous_field`` if both keys hold something else, ``missing_field`` for another form.
    """
    given = {key: _parsed(record[key], key, origin) for key in CHOICE_KEYS if not is_empty(record.get(key))}
    if len(given) == 2 and given["choices"] != given["options"]:
        raise RecordError("ambiguous_field", origin, "holds `choices` and `options`, which differ: leave one of them")
    return next(iter(given.values()), [])


def _parsed(value: Any, key: str, origin: str) -> list[Choice]:
    if isinstance(value, str):
        value = _list_in_text(value, key, origin)
    if isinstance(value, Mapping):
        letters = [name.strip("(). ").upper() for name in value]
        texts = [value[name] for name in value]
        pairs = [(letter, text) for letter, text in zip(letters, texts, strict=True) if not is_empty(text)]
        if not {*letters} <= {*string.ascii_uppercase} or len({*letters}) < len(letters):
            found = shorten(", ".join(value))
            detail = f"`{key}` must be a list, or an object of letters and texts, not of {found}"
            raise RecordError("missing_field", origin, detail)
    elif isinstance(value, list):
        if len(value) > len(string.ascii_uppercase):
            raise RecordError("missing_field", origin, f"`{key}` holds {len(value)} choices, more than letters")
        pairs = list(zip(string.ascii_uppercase, value, strict=False))
    else:
        raise RecordError("missing_field", origin, f"`{key}` must be a list or an object, not {json_kind(value)}")
    choices = [Choice(letter, _text(text, f"{key}[{letter}]", origin)) for letter, text in pairs]
    marks = [_LETTERED.match(choice.text) for choice in choices]
    if all(mark and mark.group(1).upper() == choice.letter for mark, choice in zip(marks, choices, strict=True)):
        choices = [Choice(c.letter, c.text[mark.end() :]) for c, mark in zip(choices, marks, strict=True) if mark]
    return choices


def _list_in_text(value: str, key: str, origin: str) -> Any:
    """Return the list or object that a text holds in JSON, or as Python writes it, as tables are exported."""
    for read in (decode_json_as_written, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list | tuple | dict):
            return list(found) if isinstance(found, tuple) else found
    detail = f"`{key}` is a text that holds no list ({shorten(value)}); write a list of texts"
    raise RecordError("missing_field", origin, detail)


def _text(value: Any, key: str, origin: str) -> str:
    if isinstance(value, WrittenNumber | int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        what = "empty" if isinstance(value, str) else json_kind(value)
        raise RecordError("missing_field", origin, f"`{key}` must be a text or a number, not {what}")
    return checked_text(value, key, origin).strip()


def with_choices(question: str, choices: list[Choice], origin: str) -> str:
    """Return ``question`` with a line ``A. red`` for each choice, unless it holds them with these letters already.

    Raises:
        RecordError: ``ambiguous_field`` if it gives the same letters to other texts.
    """
    if not choices:
        return question
    marks = list(_marks(question))
    if {letter for letter, _ in marks} >= {choice.letter for choice in choices}:
        if all(any(_begins_with(rest, c.text) for letter, rest in marks if letter == c.letter) for c in choices):
            return question
        detail = "`question` letters its options otherwise than `choices` does; leave one of them"
        raise RecordError("ambiguous_field", origin, detail)
    return "\n".join([question, *(f"{choice.letter}. {choice.text}" for choice in choices)])


def _marks(text: str) -> list[tuple[str, str]]:
    """Return the letter of every mark of an option, such as ``(b)``, that begins a word, and all text behind it."""
    found = [match for match in _LETTERED.finditer(text) if match.start() == 0 or not text[match.start() - 1].isalnum()]
    return [(match.group(1).upper(), text[match.end() :]) for match in found]


def _begins_with(text: str, beginning: str) -> bool:
    words, first = text.casefold().split(), beginning.casefold().split()
    rest = " ".join(words).removeprefix(" ".join(first))
    return rest != " ".join(words) and re.match(r"\w|[.,]\d", rest) is None


def answer_in_letters(answer: str, is_number: bool, choices: list[Choice], origin: str) -> str:
    """Return an answer as verifiers compare it: ``B`` for a letter or an index from 0, ``B. blue`` for a text.

    Args:
        answer: as it is written; letters may be several, ``A, C``.
        is_number: whether it is written as a number of JSON.
        choices: the question's; without any, ``answer`` is returned.
        origin: ``file:line`` of the question.

    Raises:
        RecordError: ``ambiguous_answer`` if it names two choices in two ways, ``answer_not_a_choice`` if it names none.
    """
    if not choices:
        return answer
    equal = [choice for choice in choices if _same(choice.text, answer)]
    if is_number and re.fullmatch(r"-?\d+", answer):
        if equal:
            detail = f"`answer` {answer} is an index and a choice's text: write the letter, or the text as a string"
            raise RecordError("ambiguous_answer", origin, detail)
        index = int(answer) if len(answer) < 4 else -1
        letter = string.ascii_uppercase[index] if 0 <= index < len(string.ascii_uppercase) else ""
        if all(choice.letter != letter for choice in choices):
            detail = f"`answer` {shorten(answer)} is no index of {len(choices)} choices, counted from 0"
            raise RecordError("answer_not_a_choice", origin, detail)
        return letter
    lettered = _named_by_letter(answer, choices)
    if len(equal) > 1 or (equal and lettered is not None and lettered != equal[0].letter):
        detail = f"`answer` {shorten(repr(answer))} names more than one choice; write the letter with its text"
        raise RecordError("ambiguous_answer", origin, detail)
    if equal:
        return f"{equal[0].letter}. {equal[0].text}"
    if lettered is None:
        known = shorten(", ".join(f"{choice.letter}. {choice.text}" for choice in choices))
        detail = f"`answer` {shorten(repr(answer))} is none of the choices ({known}); write a letter or a text of them"
        raise RecordError("answer_not_a_choice", origin, detail)
    return lettered


def _named_by_letter(answer: str, choices: list[Choice]) -> str | None:
    """Return ``B``, ``A, C`` or ``B. blue`` for an answer that names choices by their letters, else None."""
    by_letter = {choice.letter: choice for choice in choices}
    parts = [part.strip("(). ").upper() for part in re.split(r"[,;]", answer)]
    if all(part in by_letter for part in parts):
        return ", ".join(parts)
    mark = _LETTERED.match(answer.strip())
    choice = by_letter.get(mark.group(1).upper()) if mark else None
    if mark and choice and _same(choice.text, answer.strip()[mark.end() :]):
        return f"{choice.letter}. {choice.text}"
    return None


def _same(one: str, other: str) -> bool:
    if one.casefold().rstrip(" .").split() == other.casefold().rstrip(" .").split():
        return True
    try:
        return float(one) == float(other)
    except ValueError:
        return False
