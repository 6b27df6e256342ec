"""Hashes that are kept in files: their values must never change."""

from hashlib import blake2b

from vlmpo.hashing import content_hash, stable_hash


def test_parts_are_hashed_end_to_end() -> None:
    assert content_hash("a", b"b", "ü", size=8) == blake2b("abü".encode(), digest_size=8).hexdigest()
    assert content_hash("abü") == content_hash(b"ab", "ü") == blake2b("abü".encode(), digest_size=16).hexdigest()


def test_values_stay() -> None:
    assert stable_hash("text:Q?") == int(content_hash("text:Q?", size=8), 16)
    assert content_hash("half \ud83d", size=4) == blake2b(b"half \xed\xa0\xbd", digest_size=4).hexdigest()
