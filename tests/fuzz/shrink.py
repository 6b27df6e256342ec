"""Make a faulty input small, as long as it fails in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 2.0


def shrink(case: Any, fails: Callable[[Any], bool]) -> Any:
    """A smaller input that fails as ``case`` does; greedy, within a few seconds."""
    until = time.monotonic() + SECONDS
    smaller = True
    while smaller:
        smaller = False
        for candidate in smaller_ones(case):
            if time.monotonic() > until:
                return case
            if fails(candidate):
                case, smaller = candidate, True
                break
    return case


def smaller_ones(value: Any) -> Iterator[Any]:
    """Values with something left out, large pieces first."""
    if isinstance(value, dict):
        for key in value:
            yield {name: item for name, item in value.items() if name != key}
        for key, item in value.items():
            for smaller in smaller_ones(item):
                yield {**value, key: smaller}
    elif isinstance(value, tuple):  # its length is the input's own
        for at, item in enumerate(value):
            for smaller in smaller_ones(item):
                yield (*value[:at], smaller, *value[at + 1 :])
    elif isinstance(value, list | str | bytes) and value:
        size = len(value)
        while size := size // 2:
            for at in range(0, len(value), size):
                yield value[:at] + value[at + size :]
        if isinstance(value, list):
            for at, item in enumerate(value):
                for smaller in smaller_ones(item):
                    yield [*value[:at], smaller, *value[at + 1 :]]
