"""Answer keys of other tools with what to write here in their place. Imports neither torch nor transformers.

A recipe, an option of the command line and a keyword of MPOConfig that are theirs get the same answer from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmpo.foreign_table import TABLE, Row, Settings

# A section that is given one value, as in `model: org/name` or `--model org/name`: the key of it that is meant.
MEANT_BY_SECTION = {"model": "model.path", "reference": "reference.kind", "data": "data.train"}


@dataclass(frozen=True)
class Answer:
    """What to write in place of one or several keys of other tools.

    Attributes:
        keys: theirs.
        tools: whose they are.
        ours: our dotted key, "" if there is none.
        value: our value; None if it cannot be told.
        say: a remark; if ``ours`` is empty, the whole answer.
    """

    keys: tuple[str, ...]
    tools: str
    ours: str
    value: Any = None
    say: str = ""

    def named(self, kind: str, write: Callable[[str, Any], str]) -> str:
        """Return the keys, each a ``kind`` (key, option), and the answer."""
        return f"{', '.join(self.keys)}: {f'a {kind}' if len(self.keys) == 1 else f'{kind}s'} {self.text(write)}"

    def text(self, write: Callable[[str, Any], str]) -> str:
        """Return the answer in words; ``write`` shows a dotted key and a value as they are written at that place."""
        advice = [f"write {write(self.ours, self.value)}"] if self.ours else []
        return f"of {self.tools}; {'; '.join([*advice, *filter(None, [self.say])])}"


def answers(given: Settings, beside: Settings | None = None) -> list[Answer]:
    """Return an answer for each key of ``given`` that is another tool's; keys that share one of ours share it.

    ``beside`` are settings given with them that need no answer, but that a value may depend on.
    """
    named = {str(key).replace("-", "_"): (str(key), value) for key, value in given.items()}
    rows = [TABLE[name] for name in named if name in TABLE]
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.ours, row.joint) if row.joint else row.key, []).append(row)
    settings = {**(beside or {}), **{name: value for name, (_, value) in named.items()}}
    return [_answer(group, named, settings) for group in groups.values()]


def _answer(group: list[Row], named: Mapping[str, tuple[str, Any]], settings: Settings) -> Answer:
    first = group[0]
    if first.joint is not None:
        value = first.joint(settings)
    else:
        value = settings[first.key] if first.value is None else first.value(settings[first.key])
    tools = set.intersection(*(set(row.tools.split(", ")) for row in group)) or set(first.tools.split(", "))
    keys = tuple(named[row.key][0] for row in group)
    return Answer(keys, ", ".join(sorted(tools, key=str.lower)), first.ours, value, first.say)
