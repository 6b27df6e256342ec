"""What tells one prompt or one draw from another, the same in every process."""

from __future__ import annotations

import hashlib


def prompt_hash(prompt: str) -> str:
    """16 hex digits of a prompt: what ``settings["prompt_hash"]`` of a response holds of the one it answered."""
    return hashlib.blake2b(prompt.encode("utf-8"), digest_size=8).hexdigest()


def seed_for(seed: int, name: str) -> int:
    """A 64-bit seed that depends on ``seed`` and ``name`` alone."""
    return int(prompt_hash(f"{seed}:{name}"), 16)
