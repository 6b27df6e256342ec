"""Make broken input of valid input: JSON trees with odd values, texts and bytes with odd pieces, and noise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

# What no text should hold, or few readers think of.
ODD_TEXTS = (
    *(
        "",
        " ",
        "\0",
        "\x1b[31m",
        "\ud83d",
        "a\udc00b",
        "\ufeff",
        "\u2028",
        "\r\n",
        "\x7f\x85",
        "\\",
        '"',
        "{",
        "}",
        "%s",
    ),
    *("<image>", "<video>", "<image>\n<image>", "<|im_end|>", "<IMG_CONTEXT>", "{question}", "{{ 7 }}", "${HOME}"),
    *("file://[bad", "file://h/x", "http://[::1", "http://\0", "data:image/png;base64,!", "~", "~nobody/x", "/", "."),
    *("../../../etc/passwd", "/dev/null", "a" * 300, "a/" * 3000, "x\0y.png", "\udcff.png", "[", "[!", "[]x", "CON"),
    *("nan", "-inf", "1e999", "0x10", "1_000", "٣", "½", "²", "１２", "1/0", "0/0", "9" * 400, "1e-400", "-", "+"),
    *("null", "true", "no", "!!python/object/apply:os.getcwd []", "&a [*a]", "<<: x", "? y", "- - - z", "2026-01-31"),
    *("\\frac{1}{0}", "\\sqrt{" * 30, "$" * 50, "x^" * 40 + "2", "(((((" * 20, "10^{10^{10}}", "\\boxed{", "9!!!!"),
    *("İ", "ß", "ﬀ", "\u0301" * 50, "\u202e", "👩‍👩‍👧‍👦", "Final answer:" * 20, "A" * 5000),
)


_HUGE = 40 << 20  # bytes of a text that one file in 20,000 ends with


class Raw(str):
    """JSON that is written as it is: what ``json.dumps`` would not write."""

    __slots__ = ()


def _nested(rng: random.Random) -> Raw:
    depth = rng.choice((5, 5, 5, 50, 50, 200, 500, 990, 3000)) if rng.random() < 0.95 else 100_000
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return Raw(opening * depth + ("" if opening == "[" else "1") + closing * depth)


def odd_text(rng: random.Random) -> str:
    """A text that few readers think of; one in a thousand is long, few are megabytes long."""
    chance = rng.random()
    if chance < 0.0002:
        return rng.choice(("a", "<image>", "1 + ", "é")) * 1_500_000
    if chance < 0.001:
        return rng.choice(("a", "\n", "x = ", "{", "\ud83d")) * 50_000
    if chance < 0.05:
        return "".join(map(chr, (rng.choice((rng.randrange(32), rng.randrange(0x3000))) for _ in range(8))))
    return rng.choice(ODD_TEXTS)


_ODD: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: rng.choice((None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 2**31, 2**63, 2**64, -(2**63) - 1)),
    lambda rng: Raw(rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "9" * 5000, "-0", "1E400"))),
    lambda rng: rng.choice(
        ([], {}, [[]], [None], [""], {"": ""}, [{}], [0], [[[]]], {"a": {"b": [1]}}, [1, "a", None])
    ),
    _nested,
    odd_text,
    odd_text,
)


def odd_value(rng: random.Random) -> Any:
    """Any JSON value but a sensible one."""
    return rng.choice(_ODD)(rng)


def mutated(value: Any, rng: random.Random, borrow: tuple[Any, ...] = ()) -> Any:
    """A copy of a JSON value with one change somewhere in it; ``borrow`` are values of other examples."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.6:
            return {**value, key: mutated(value[key], rng, borrow)}
        return _with_other_keys(value, key, rng, borrow)
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        change = rng.randrange(4)
        if change == 0:
            return value[:at] + value[at + 1 :]
        if change == 1:
            return value[:at] + [value[at]] * rng.choice((2, 3, 200)) + value[at:]
        return [*value[:at], mutated(value[at], rng, borrow), *value[at + 1 :]]
    if isinstance(value, str) and not isinstance(value, Raw) and rng.random() < 0.5:
        return mutated_text(value, rng)
    if borrow and rng.random() < 0.2:
        return rng.choice(borrow)
    return odd_value(rng)


def _with_other_keys(value: dict[str, Any], key: str, rng: random.Random, borrow: tuple[Any, ...]) -> Any:
    rest = {name: item for name, item in value.items() if name != key}
    change = rng.randrange(5)
    if change == 0:
        return rest
    if change == 1:  # the key under another name, or another key's
        return {**rest, rng.choice([odd_text(rng), key.upper(), key + "s", *value]): value[key]}
    if change == 2:  # given twice
        other = dumps(odd_value(rng))
        return Raw(f"{dumps(value)[:-1]}, {json.dumps(key)}: {other}}}")
    if change == 3:
        return {**value, odd_text(rng): odd_value(rng)}
    return {**value, key: rng.choice(borrow)} if borrow else {**value, key: [value[key]]}


def dumps(value: Any, ascii_only: bool = True) -> str:
    """JSON of a value, in which a Raw is written as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        items = (
            f"{json.dumps(key, ensure_ascii=ascii_only)}: {dumps(item, ascii_only)}" for key, item in value.items()
        )
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list):
        return f"[{', '.join(dumps(item, ascii_only) for item in value)}]"
    return json.dumps(value, ensure_ascii=ascii_only)


def mutated_text(text: str, rng: random.Random) -> str:
    """A text with one change: a piece put in, taken out, repeated, or moved."""
    at, other = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    change = rng.randrange(5)
    if change == 0:
        return text[:at] + odd_text(rng) + text[at:]
    if change == 1:
        return text[:at] + text[other:]
    if change == 2:
        return text[:other] + text[at:other] * rng.choice((1, 2, 30)) + text[other:]
    if change == 3:
        return text[other:] + text[:other]
    return text[:at] + odd_text(rng) + text[other:]


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes with one change: a bit, a piece put in, taken out or repeated; another encoding."""
    at, other = sorted((rng.randint(0, len(content)), rng.randint(0, len(content))))
    change = rng.randrange(7)
    if change == 0 and content:
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if change == 1:
        return content[:at] + content[other:]
    if change == 2:
        return content[:other] + content[at:other] * rng.choice((1, 2, 30)) + content[other:]
    if change == 3:
        return content[:at]
    if change == 4:
        encoding = rng.choice(("utf-16", "utf-16-be", "utf-32", "latin-1", "utf-7", "utf-8-sig"))
        return content.decode("utf-8", "replace").encode(encoding, "replace")
    piece = rng.choice(
        (b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\xed\xa0\x80", b"\x1b[2J", b"\xc3")
    )
    return content[:at] + piece * rng.choice((1, 1, 1, 40)) + content[at:]


def noise(rng: random.Random) -> bytes:
    """Random bytes, or random signs of a grammar."""
    length = rng.choice((0, 1, 7, 60, 400))
    if rng.random() < 0.5:
        return rng.randbytes(length)
    return "".join(rng.choices('{}[]",:\\\n 0123456789.eE+-truefalsn\t#&*!|>%@`~=', k=length)).encode()


def file_content(records: list[Any], rng: random.Random, write: Callable[[list[Any]], str]) -> bytes:
    """The bytes of a file of valid ``records``, broken in one way or another."""
    chance = rng.random()
    if chance < 0.06:
        return noise(rng)
    if chance < 0.75:
        at = rng.randrange(len(records))
        record = records[at]
        for _ in range(rng.choice((1, 1, 2, 4))):
            record = mutated(record, rng, tuple(records))
        records = [*records[:at], record, *records[at + 1 :]]
    content = write(records).encode("utf-8", "surrogatepass")
    if chance > 0.7:
        for _ in range(rng.choice((1, 1, 3))):
            content = mutated_bytes(content, rng)
    if chance > 0.99995:
        content += b'{"image": "' + b"a" * _HUGE + b'"}\n'
    return content
