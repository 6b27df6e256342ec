"""What goes wrong on the way to the Hub, in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vlmpo.errors import RunError, first_line


@contextlib.contextmanager
def hub_errors(remedy: str) -> Iterator[None]:
    """Turn an error of the Hub in the body into a RunError that ends in ``remedy``."""
    try:
        yield
    except OSError as error:
        raise RunError(f"training.push_to_hub: {first_line(error)}{remedy}") from error
