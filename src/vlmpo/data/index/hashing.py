"""Hashes of texts, and which code decides what is found in a data set."""

from __future__ import annotations

import sys
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

from vlmpo.data.records import IMAGE_PLACEHOLDER


def stable_hash(text: str) -> int:
    """64 bits that depend on the text alone: Python's own hash() differs from one process to the next."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def words_hash(text: str) -> int:
    """:func:`stable_hash` of the words of a prompt, with case, spaces and image placeholders evened out."""
    return stable_hash(" ".join(text.replace(IMAGE_PLACEHOLDER, " ").lower().split()))


@lru_cache(maxsize=1)
def rules() -> str:
    """A hash of the code below ``vlmpo.data``: where it changes, what was found by it before counts for nothing."""
    digest = blake2b(f"{version('vlmpo')} {sys.version_info[:2]} {sys.byteorder}".encode(), digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
