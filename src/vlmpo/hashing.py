"""Compute hashes that are the same in every process and on every machine, unlike Python's own ``hash``."""

from __future__ import annotations

from hashlib import blake2b


def content_hash(*parts: str | bytes, size: int = 16) -> str:
    """Return the BLAKE2b hash of ``parts``, end to end, as ``2 * size`` hexadecimal digits.

    Strings count as UTF-8; lone surrogates, which paths and JSON may hold, are allowed.
    """
    digest = blake2b(digest_size=size)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return digest.hexdigest()


def stable_hash(text: str) -> int:
    """Return 64 bits that depend on ``text`` alone."""
    return int(content_hash(text, size=8), 16)


def content_key(*parts: bytes | memoryview) -> bytes:
    """Hash ``parts`` to 16 bytes, which differ if any part differs or the same bytes are cut elsewhere."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
