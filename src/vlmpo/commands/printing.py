"""Plain lines and tables for the user: never wrapped or cut, so that they can be piped and copied."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Plain text: no markup in it is read, and no long line is wrapped."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_table(console: Console, title: str, rows: Sequence[Sequence[object]]) -> None:
    """The rows, the first of them the header, in aligned columns."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    print_line(console, f"\n{title}", style="bold")
    for name, *numbers in rows:
        cells = [f"{cell!s:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)]
        print_line(console, "  ".join([f"  {name!s:<{widths[0]}}", *cells]))
