"""Choose which trees share a row: few rows, each within a bound of tokens or of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlmpo.tree.layout import PromptTree

SHARES = 1_000_000  # of a row's memory: costs are whole numbers, so that every machine packs alike


@dataclass(frozen=True)
class RowBound:
    """Bounds what a row holds: its tokens, or the bytes that its tokens and patches take while it is read.

    Attributes:
        most: largest cost of a row, unless a single tree costs more; None: no bound.
        limits: ``(bytes per token, bytes per patch, bytes)`` for each phase of a pass: what a token and a patch take,
            and what there is. A tree costs its largest share of any of them, in millionths. Empty: a tree costs its
            tokens.
        patch_pixels: pixels of a patch.
        divide: whether pairs of one prompt that cost more than a row are read apart.
    """

    most: int | None = None
    limits: tuple[tuple[int, int, int], ...] = ()
    patch_pixels: int = 1
    divide: bool = False

    def cost(self, tree: PromptTree) -> int:
        """Return what ``tree`` costs."""
        return self.cost_of(tree.num_tokens, count_patches(tree, self.patch_pixels) if self.limits else 0)

    def cost_of(self, tokens: int, patches: int) -> int:
        """Return what a tree of this size costs."""
        if not self.limits:
            return tokens
        return max(
            SHARES * (per_token * tokens + per_patch * patches) // max(room, 1)
            for per_token, per_patch, room in self.limits
        )

    def to_json(self) -> dict[str, Any]:
        """Return the bound in plain JSON values."""
        return {**asdict(self), "limits": [list(limit) for limit in self.limits]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RowBound:
        """Return what :meth:`to_json` was called on."""
        return cls(**{**values, "limits": tuple(tuple(limit) for limit in values["limits"])})


def count_patches(tree: PromptTree, patch_pixels: int) -> int:
    """Return the patches of ``patch_pixels`` pixels in the pictures and frames of ``tree``, padding among them."""
    patches = 0
    for name, tensor in tree.vision.items():
        if name.startswith("pixel_values"):
            # The Qwen-VL families list patches; all others have pixels of three colours.
            patches += tensor.shape[0] if tensor.dim() < 4 else tensor.numel() // (3 * patch_pixels)
    return patches


def pack(
    trees: Sequence[PromptTree], most: int | None, cost: Callable[[PromptTree], int] = lambda tree: tree.num_tokens
) -> list[list[int]]:
    """Choose which trees go into which row.

    A short search looks for few rows of similar cost. The same trees give the same rows.

    Args:
        trees: trees to pack.
        most: largest cost of a row, unless a single tree costs more; None: all in one row.
        cost: what a tree costs; by default its tokens.

    Returns:
        Indices of the trees of each row, in order within a row; the costliest row first.
    """
    sizes = [cost(tree) for tree in trees]
    if most is None:
        return [list(range(len(sizes)))] if sizes else []
    alone = [[index] for index, size in enumerate(sizes) if size > most]
    others = [index for index, size in enumerate(sizes) if size <= most]
    longest_first = sorted(others, key=lambda index: -sizes[index])
    rows = min((_first_fit(order, sizes, most) for order in (longest_first, others)), key=len)
    fewest = -(-sum(sizes[index] for index in others) // max(most, 1))
    for count in range(max(fewest, 1), len(rows) + 1):
        even = _evenly(longest_first, sizes, count)
        if all(sum(sizes[index] for index in row) <= most for row in even):
            rows = even
            break
    filled = [sorted(row) for row in (*alone, *rows) if row]
    return sorted(filled, key=lambda row: (-sum(sizes[index] for index in row), row))


def _first_fit(order: Sequence[int], sizes: Sequence[int], most: int) -> list[list[int]]:
    """Put each tree into the first row that has room for it.

    There are never more rows than if each row were closed for the next.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []
    for index in order:
        at = next((at for at, room in enumerate(rooms) if room >= sizes[index]), len(rows))
        if at == len(rows):
            rows.append([])
            rooms.append(most)
        rows[at].append(index)
        rooms[at] -= sizes[index]
    return rows


def _evenly(longest_first: Sequence[int], sizes: Sequence[int], count: int) -> list[list[int]]:
    """Put each tree into the cheapest of ``count`` rows so far."""
    rows: list[list[int]] = [[] for _ in range(count)]
    lengths = [0] * count
    for index in longest_first:
        at = lengths.index(min(lengths))
        rows[at].append(index)
        lengths[at] += sizes[index]
    return rows
