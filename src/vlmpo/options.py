"""Settings given as options, ``--learning_rate 1e-6``, as other tools take them: what to write instead."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

from vlmpo.errors import RecipeError
from vlmpo.foreign_keys import MEANT_BY_SECTION, answers
from vlmpo.recipe import SECTIONS, in_file, nearest, places
from vlmpo.recipe_yaml import on_command_line, read_yaml

_OPTION = re.compile(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_OVERRIDE = re.compile(r"\w+(\.\w+)+=")


def answer_options(arguments: Sequence[str], known: Collection[str]) -> str | None:
    """Return what to write in place of options that are settings; None if ``arguments`` hold none.

    Args:
        arguments: of a command that takes a recipe and overrides.
        known: the command's own options, as they are written.
    """
    given = _settings(arguments, known)
    told = {key: answer for answer in answers(given) for key in answer.keys}
    lines: dict[str, None] = {}
    strange = 0
    for key, value in given.items():
        if answer := told.get(key):
            options = " ".join(_as_given(name, given[name]) for name in answer.keys)
            kind = "an option" if len(answer.keys) == 1 else "options"
            lines[f"{options}: {kind} {answer.text(on_command_line)}"] = None
        elif ours := _ours(key):
            lines[f"{_as_given(key, value)}: write {on_command_line(ours, value)}"] = None
        else:
            hint = _misspelt(key, known)
            lines[f"--{key}: no option and no setting{hint}"] = None
            strange += not hint
    return "\n".join(lines) if len(lines) > strange else None


def _misspelt(key: str, known: Collection[str]) -> str:
    """Return the setting that ``key`` may be meant for, as an end of a message; "" if there is none."""
    if get_close_matches(f"--{key}", known, cutoff=0.8):  # an option of the command: its own message names it
        return ""
    hint = nearest(key.replace("-", "_"), ())
    return hint if "did you mean" in hint else ""


def _settings(arguments: Sequence[str], known: Collection[str]) -> dict[str, Any]:
    """Return the options that are not ``known``, with their values: what follows them up to the next option."""
    given: dict[str, Any] = {}
    position = 0
    while position < len(arguments) and arguments[position] != "--":
        option = _OPTION.fullmatch(arguments[position])
        position += 1
        if option is None or arguments[position - 1].partition("=")[0] in known:
            continue
        key, text = option[1], option[2]
        values = [] if text is None else [text]
        while text is None and position < len(arguments) and _is_value(arguments[position]):
            values.append(arguments[position])
            position += 1
        if not values and key.startswith(("no-", "no_")):
            given[key[3:]] = False
        else:
            read = [_read(value) for value in values]
            given[key] = True if not read else read[0] if len(read) == 1 else read
    return given


def _is_value(argument: str) -> bool:
    is_recipe = argument.endswith((".yaml", ".yml")) and os.path.isfile(argument)
    return not (_OPTION.fullmatch(argument) or _OVERRIDE.match(argument) or is_recipe)


def _read(text: str) -> Any:
    try:
        return read_yaml(text, "option")
    except RecipeError:
        return text


def _ours(key: str) -> str | None:
    """Return the dotted recipe key that an option means, if it is one of ours or of TrainingArguments."""
    section, _, name = key.replace("-", "_").rpartition(".")
    if section:
        is_one = name in SECTIONS[section].model_fields if section in SECTIONS else section.split(".")[0] in SECTIONS
        return f"{section}.{name}" if is_one or section == "training" or section.startswith("training.") else None
    if name in MEANT_BY_SECTION:
        return MEANT_BY_SECTION[name]
    return f"{places()[name]}{name}" if name in places() else None


def _as_given(key: str, value: Any) -> str:
    text = " ".join(in_file("", item).removeprefix(": ") for item in (value if isinstance(value, list) else [value]))
    return f"--{key}" if value is True or len(text) > 80 else f"--{key} {text}"
