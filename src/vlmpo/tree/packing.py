"""Choose which trees share a row: few rows, each within a bound of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from vlmpo.tree.layout import PromptTree


def pack(trees: Sequence[PromptTree], max_tokens: int | None) -> list[list[int]]:
    """Choose which trees go into which row.

    A short search looks for few rows of similar length. The same trees give the same rows.

    Args:
        trees: trees to pack.
        max_tokens: most tokens of a row, unless a single tree is longer; None: all in one row.

    Returns:
        Indices of the trees of each row, in order within a row; the longest row first.
    """
    sizes = [tree.num_tokens for tree in trees]
    if max_tokens is None:
        return [list(range(len(sizes)))] if sizes else []
    alone = [[index] for index, size in enumerate(sizes) if size > max_tokens]
    others = [index for index, size in enumerate(sizes) if size <= max_tokens]
    longest_first = sorted(others, key=lambda index: -sizes[index])
    rows = min((_first_fit(order, sizes, max_tokens) for order in (longest_first, others)), key=len)
    fewest = -(-sum(sizes[index] for index in others) // max_tokens)
    for count in range(max(fewest, 1), len(rows) + 1):
        even = _evenly(longest_first, sizes, count)
        if all(sum(sizes[index] for index in row) <= max_tokens for row in even):
            rows = even
            break
    filled = [sorted(row) for row in (*alone, *rows) if row]
    return sorted(filled, key=lambda row: (-sum(sizes[index] for index in row), row))


def _first_fit(order: Sequence[int], sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Put each tree into the first row that has room for it.

    There are never more rows than if each row were closed for the next.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []
    for index in order:
        at = next((at for at, room in enumerate(rooms) if room >= sizes[index]), len(rows))
        if at == len(rows):
            rows.append([])
            rooms.append(max_tokens)
        rows[at].append(index)
        rooms[at] -= sizes[index]
    return rows


def _evenly(longest_first: Sequence[int], sizes: Sequence[int], count: int) -> list[list[int]]:
    """Put each tree into the shortest of ``count`` rows so far."""
    rows: list[list[int]] = [[] for _ in range(count)]
    lengths = [0] * count
    for index in longest_first:
        at = lengths.index(min(lengths))
        rows[at].append(index)
        lengths[at] += sizes[index]
    return rows
