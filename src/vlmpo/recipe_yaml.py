"""Recipes as YAML: reading, ``key=value`` overrides, paths, error messages, writing. Imports no torch."""

from __future__ import annotations

import errno
import glob
import math
import os
import re
import shlex
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vlmpo.errors import RecipeError, first_line
from vlmpo.foreign_keys import MEANT_BY_SECTION, Answer, answers
from vlmpo.foreign_table import ALL_KEYS
from vlmpo.recipe import EXTRA_TRAINING_KEYS, SECTIONS, Recipe, in_file, nearest, training_fields, unknown_keys
from vlmpo.settings import MPO_WEIGHTS


def parse_recipe(text: str, *, where: str = "recipe") -> Recipe:
    """Return the recipe in a YAML text, paths as written. ``where`` names the text in messages.

    Raises:
        RecipeError: the text is not valid YAML, or the recipe in it is not valid.
    """
    return _validate(_read_mapping(text, where), where, overridden=())


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a YAML file, changed by ``key=value`` overrides, e.g. ``loss.beta=0.2``; values are YAML.

    A relative path in the file (models, data, questions, ``image_root``) is relative to the file's folder if it exists
    there, else to the working directory; one in an override is relative to the working directory.
    ``training.output_dir`` defaults to ``runs/<file name without suffix>``, ``build.output_dir`` to ``build`` in it.

    Raises:
        RecipeError: the message names the file, the dotted key, the value and what was expected.
    """
    path = Path(path)
    raw = _read_mapping(_read_file(path), str(path))
    _check_values(raw, str(path))
    _anchor_paths(raw, path.parent)
    overridden = [_override(raw, override) for override in overrides]
    _check_values(raw, "command line")
    _check_places(raw)
    if isinstance(training := raw.setdefault("training", {}), dict):
        training.setdefault("output_dir", os.path.join("runs", path.stem))
    if isinstance(build := raw.get("build"), dict) and build.get("output_dir") is None:
        build["output_dir"] = os.path.join("runs", path.stem, "build")
    return _validate(raw, str(path), overridden)


def dump_recipe(recipe: Recipe) -> str:
    """Return the whole recipe, defaults included, as YAML that parses back to an equal recipe."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# ---- YAML ----

# Far more than any recipe needs; what exceeds them is no recipe, or made to exhaust whoever reads it.
_MAX_BYTES = 256 << 10
_MAX_DEPTH = 32
_MAX_VALUES = 20_000  # with every alias counted as what it stands for


def _read_file(path: Path) -> str:
    """Return the text of the recipe file, which must be one: a FIFO would be waited for, a device never ends."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # reading a folder says what it is
            reason = "it is a FIFO, a device or a socket, and no file"
        elif status.st_size > _MAX_BYTES:
            reason = f"it has more than {_MAX_BYTES >> 10} KiB"
        else:
            return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except ValueError:
        reason = "its name holds a NUL character"
    raise RecipeError(f"cannot read the recipe {path}: {reason}")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what no recipe needs: a key written twice (YAML silently keeps the last one), tags, which
    make other types than JSON has, deep nesting, and aliases that stand for more and more.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            problem = f"{event.tag.replace('tag:yaml.org,2002:', '!!')}: values with a tag are not read here"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {_MAX_DEPTH} levels deep", problem_mark=event.start_mark
            )
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self.depth -= 1
        return node  # type: ignore[no-any-return]

    def compose_document(self) -> yaml.Node | None:
        node: yaml.Node | None = super().compose_document()  # type: ignore[no-untyped-call]
        left = _MAX_VALUES
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if isinstance(one, yaml.CollectionNode):
                children = [part for item in one.value for part in (item if isinstance(item, tuple) else (item,))]
                left -= len(children)
                waiting += children
            if left < 0:
                raise yaml.MarkedYAMLError(problem=f"more than {_MAX_VALUES} values, aliases written out")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key_node.value} is given twice", problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a string which _Loader would read as a number."""


# YAML 1.1 reads `1e-6` as a string, since it has no dot and its exponent no sign; everyone means the number.
_SCIENTIFIC = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))
# No setting is a date: `run_name: 2026-01-31` is a name.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a number that YAML knows and Python cannot make
        raise RecipeError(f"{where}: not valid YAML: {first_line(error)}") from None


def _read_mapping(text: str, where: str) -> dict[str, Any]:
    raw = read_yaml(text, where)
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{where}: expected a mapping with the keys {', '.join(Recipe.model_fields)}, got {raw!r:.80}"
        )
    # `training:` with all its lines commented out is an empty section
    return {key: value for key, value in raw.items() if value is not None}


def _check_values(value: Any, where: str) -> None:
    """Raise RecipeError for a value that no setting can have: a text that is none, a number without end."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        key, one = waiting.pop()
        if key.count(".") > _MAX_DEPTH:
            raise RecipeError(f"{where}: {key[:80]}...: nested more than {_MAX_DEPTH} levels deep")
        if isinstance(one, dict):
            waiting += [(f"{key}.{name}" if key else str(name), part) for name, part in one.items()]
            waiting += [(key, name) for name in one]
        elif isinstance(one, list):
            waiting += [(f"{key}.{number}", part) for number, part in enumerate(one)]
        elif isinstance(one, str) and ("\0" in one or (not one.isascii() and not _is_text(one))):
            raise RecipeError(f"{where}: {key or 'a key'}: {one!r:.80} holds a NUL character or half of a character")
        elif isinstance(one, float) and not math.isfinite(one):
            raise RecipeError(f"{where}: {key}: expected a finite number, got {one}")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


# ---- overrides and paths ----


def _override(raw: dict[str, Any], override: str) -> str:
    """Set one ``a.b=value`` in ``raw`` and return ``a.b``."""
    if len(override) > _MAX_BYTES:
        raise RecipeError(f"override {override[:40]!r}...: it has more than {_MAX_BYTES >> 10} KiB")
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys) or len(keys) > _MAX_DEPTH:
        raise RecipeError(f"override {override!r}: expected key=value, e.g. loss.beta=0.2")
    value = read_yaml(text, f"override {override!r}")
    if keys[:2] == ["loss", "weights"] and len(keys) > 2:
        # One weight of an objective that the file leaves at its default: the other terms stay on.
        loss = raw.setdefault("loss", {})
        if isinstance(loss, dict):
            loss.setdefault("weights", dict(MPO_WEIGHTS))
    section: Any = raw
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise RecipeError(f"override {override!r}: {'.'.join(keys[:depth])} is {section!r} and has no keys")
    section[keys[-1]] = value
    return ".".join(keys)


_PATH_KEYS = {
    "model": ("path",),
    "build": ("questions", "image_root"),
    "evaluate": ("model", "reference", "against", "questions", "image_root"),
}
_SOURCE_PATH_KEYS = ("path", "image_root")


def _anchor_paths(raw: dict[str, Any], folder: Path) -> None:
    """Make each relative path in ``raw`` that exists below ``folder`` absolute; validation reports wrong types."""
    tables = [(raw.get(section), keys) for section, keys in _PATH_KEYS.items()]
    data = raw.get("data")
    for part in ("train", "eval"):
        if isinstance(data, dict) and isinstance(data.get(part), list):
            data[part] = [{"path": source} if isinstance(source, str) else source for source in data[part]]
            tables += [(source, _SOURCE_PATH_KEYS) for source in data[part]]
    for table, keys in tables:
        if isinstance(table, dict):
            table.update({key: _anchored(table[key], folder) for key in keys if key in table})


def _anchored(value: Any, folder: Path) -> Any:
    if not isinstance(value, str) or not value:
        return value
    beside = folder / os.path.expanduser(value)
    with suppress(OSError):  # a name that is too long: _check_places reports it
        matches = glob.has_magic(str(beside)) and any(glob.iglob(str(beside), recursive=True))
        if beside.exists() or matches:
            return os.path.abspath(beside)
    return os.path.expanduser(value)


_OUTPUT_KEYS = {"training": ("output_dir",), "reference": ("cache_dir",), "build": ("output_dir",)}


def _check_places(raw: dict[str, Any]) -> None:
    """Raise RecipeError for a path that no system call takes, or that leads to what is neither a file nor a folder."""
    places = [(section, key) for table in (_PATH_KEYS, _OUTPUT_KEYS) for section, keys in table.items() for key in keys]
    values = {f"{section}.{key}": _get(raw, section, key) for section, key in [*places, ("evaluate", "output_dir")]}
    for part in ("train", "eval"):
        sources = _get(raw, "data", part)
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            named = source if isinstance(source, dict) else {"path": source}
            values |= {f"data.{part}.{number}.{key}": named.get(key) for key in _SOURCE_PATH_KEYS}
    for key, value in values.items():
        if not isinstance(value, str):
            continue
        try:
            mode = os.stat(value).st_mode
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                raise RecipeError(
                    f"{key}: {value[:80]!r}{'...' if len(value) > 80 else ''}: {error.strerror}"
                ) from None
            continue  # a Hub name, or a path whose reader says what is wrong
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise RecipeError(f"{key}: {value}: expected a file or a folder, this is a FIFO, a device or a socket")


def _get(raw: dict[str, Any], section: str, key: str) -> Any:
    found = raw.get(section)
    return found.get(key) if isinstance(found, dict) else None


# ---- validation and its messages ----

_EXPECTED = {
    "model_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "tuple_type": "a list",
    "string_too_short": "a name or path",
}


def _validate(raw: dict[str, Any], where: str, overridden: Sequence[str]) -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    places = ["command line" if _is_given_by(overridden, problem["loc"]) else where for problem in problems]
    told = _answered(problems, places)
    lines: dict[str, None] = {}  # an answer for several keys is one line
    for problem, place in zip(problems, places, strict=True):
        write = on_command_line if place == "command line" else in_file
        if answer := told.get(problem["loc"]):
            lines[f"{place}: {answer.named('key', write)}"] = None
        elif problem["type"] != "missing" or not any(a.ours == f"{problem['loc'][0]}.path" for a in told.values()):
            lines[f"{place}: {_explain('.'.join(map(str, problem['loc'])), problem, write)}"] = None
    if isinstance(training := raw.get("training"), dict):  # otherwise checked once transformers is loaded
        known = [*training_fields(), *EXTRA_TRAINING_KEYS]
        lines |= dict.fromkeys(f"{where}: {line}" for line in unknown_keys("training", training, known))
    if len(told) > 1:
        lines[f"(keys of other tools and ours: {ALL_KEYS})"] = None
    raise RecipeError("\n".join(lines))


def _is_given_by(overridden: Sequence[str], place: Sequence[str | int]) -> bool:
    dotted = ".".join(map(str, place))
    return any(dotted == key or dotted.startswith(f"{key}.") for key in overridden)


def _answered(problems: Sequence[Any], places: Sequence[str]) -> dict[tuple[str | int, ...], Answer]:
    """Return the answers to unknown keys that are another tool's, by the place of the key."""
    sections: dict[Any, dict[str, Any]] = {}
    for problem, place in zip(problems, places, strict=True):
        if problem["type"] == "extra_forbidden":
            sections.setdefault((place, problem["loc"][:-1]), {})[str(problem["loc"][-1])] = problem["input"]
    return {
        (*section, key): answer
        for (_, section), given in sections.items()
        for answer in answers(given)
        for key in answer.keys
    }


def on_command_line(key: str, value: Any) -> str:
    """Return a dotted key and its value as an argument of a shell command."""
    return shlex.quote(in_file(key, value).replace(": ", "=", 1)) if value is not None else f"{key}=..."


def _explain(dotted: str, problem: Any, write: Callable[[str, Any], str]) -> str:
    """Return one line for one pydantic error at the key ``dotted``; ``write`` shows a key and its value."""
    kind = problem["type"]
    if kind == "extra_forbidden":
        parts = [part for part in problem["loc"] if isinstance(part, str)]
        section = ".".join(parts[:-1])
        if "." in parts[-1]:
            key = parts[-1].rpartition(".")
            return f"{dotted}: dots are for the command line; in a file {key[2]} is a line under {key[0]}"
        return f"{dotted}: unknown key{nearest(parts[-1], list(SECTIONS[section].model_fields), section)}"
    if kind == "missing":
        return f"{dotted}: missing; the recipe must give it"
    if kind == "value_error":  # raised by a validator of ours, with a full message
        return f"{dotted}: {problem['ctx']['error']}" if dotted else str(problem["ctx"]["error"])
    expected = _EXPECTED.get(kind, problem["msg"].removeprefix("Input should be "))
    given = problem["input"]
    meant = MEANT_BY_SECTION.get(dotted) if isinstance(given, str) else None
    advice = f"; write {write(meant, given)}" if meant else ""
    return f"{dotted}: expected {expected}, got {given!r:.80}{advice}"
