"""The demo's visual task: small drawings of nine cells and sums over what is counted in them.

A scene is nine cells, each empty or one of three colours times three shapes. A question adds or subtracts two counts,
each over one row or column. A worked answer counts aloud and then computes; a direct answer is its last sentence
alone. Every sentence is words separated by single spaces, so that a word-level tokenizer reproduces it exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from vlmpo.data.records import IMAGE_PLACEHOLDER, Message, PreferencePair

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220)}
SHAPES = ("circle", "square", "triangle")
EMPTY = "empty"
CELLS = (EMPTY, *(f"{colour}-{shape}" for colour in COLOURS for shape in SHAPES))
KINDS = ("shapes", *(f"{colour}-shapes" for colour in COLOURS), *(f"{shape}s" for shape in SHAPES))
LINES = {
    **{f"{name}-row": (3 * i, 3 * i + 1, 3 * i + 2) for i, name in enumerate(("top", "middle", "bottom"))},
    **{f"{name}-column": (i, i + 3, i + 6) for i, name in enumerate(("left", "middle", "right"))},
}
CELL_PIXELS = 16
IMAGE_PIXELS = 3 * CELL_PIXELS
EMPTY_SHARE = 0.25
ADD_SHARE = 0.65
LARGEST_ANSWER = 6

Scene = tuple[str, ...]  # nine entries of CELLS, row by row


@cache
def _tile(cell: str) -> np.ndarray:
    """Pixels of one cell [16, 16, 3], uint8."""
    tile = Image.new("RGB", (CELL_PIXELS, CELL_PIXELS), "white")
    if cell != EMPTY:
        colour, shape = cell.split("-")
        draw, low, high = ImageDraw.Draw(tile), 2, CELL_PIXELS - 3
        if shape == "circle":
            draw.ellipse((low, low, high, high), outline=COLOURS[colour], width=3)
        elif shape == "square":
            draw.rectangle((low, low, high, high), fill=COLOURS[colour])
        else:
            draw.polygon(((low, high), (high, high), (CELL_PIXELS // 2, low)), fill=COLOURS[colour])
    return np.asarray(tile)


def render(scene: Scene) -> Image.Image:
    """The scene as a 48x48 RGB image."""
    rows = [np.concatenate([_tile(cell) for cell in scene[start : start + 3]], axis=1) for start in (0, 3, 6)]
    return Image.fromarray(np.concatenate(rows, axis=0))


def caption(scene: Scene, lines: Sequence[str]) -> str:
    """The cells of some lines: ``top-row: red-circle empty blue-square . left-column: ...``."""
    return " ".join(f"{line}: {' '.join(scene[place] for place in LINES[line])} ." for line in lines)


@dataclass(frozen=True, slots=True)
class Count:
    """What is counted (one of KINDS) and where (one of LINES)."""

    kind: str
    line: str

    def __str__(self) -> str:
        return f"{self.kind} in {self.line}"

    def matches(self, cell: str) -> bool:
        """Whether ``cell`` belongs to what is counted."""
        if cell == EMPTY:
            return False
        wanted = self.kind.removesuffix("-shapes").removesuffix("s")
        return wanted == "shape" or wanted in cell.split("-")

    def of(self, scene: Scene) -> int:
        """The count, 0 to 3."""
        return sum(self.matches(scene[place]) for place in LINES[self.line])

    def aloud(self, scene: Scene) -> str:
        """The counting, cell before number: ``red-shapes in top-row: red-circle 1 empty 1 red-square 2 .``."""
        words, total = [], 0
        for place in LINES[self.line]:
            total += self.matches(scene[place])
            words.append(f"{scene[place]} {total}")
        return f"{self}: {' '.join(words)} ."


@dataclass(frozen=True, slots=True)
class Question:
    """Two counts over one scene, added or subtracted; a difference is never negative."""

    scene: Scene
    left: Count
    right: Count
    add: bool

    @property
    def text(self) -> str:
        """What the user asks."""
        return f"Count {self.left} {'plus' if self.add else 'minus'} {self.right} ."

    @property
    def truth(self) -> int:
        """The right answer, 0 to LARGEST_ANSWER."""
        left, right = self.left.of(self.scene), self.right.of(self.scene)
        return left + right if self.add else left - right

    @property
    def direct(self) -> str:
        """The answer without its working."""
        return f"Final answer: {self.truth} ."

    @property
    def worked(self) -> str:
        """The answer that counts aloud, computes, and ends as the direct one."""
        left, right = self.left.of(self.scene), self.right.of(self.scene)
        computed = f"{left} {'+' if self.add else '-'} {right} = {self.truth} ."
        return f"{self.left.aloud(self.scene)} {self.right.aloud(self.scene)} {computed} {self.direct}"


class SceneSource:
    """Draws scenes, none of them twice: what one split was given, no other split gets."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._given: set[Scene] = set()

    def scene(self) -> Scene:
        """A scene not given before."""
        while True:
            empty = self._random.random(9) < EMPTY_SHARE
            filled = self._random.integers(1, len(CELLS), 9)
            scene = tuple(CELLS[0 if e else f] for e, f in zip(empty, filled, strict=True))
            if scene not in self._given:
                self._given.add(scene)
                return scene

    def scenes(self, number: int) -> Iterator[Scene]:
        """``number`` scenes not given before."""
        return (self.scene() for _ in range(number))

    def questions(self, number: int) -> list[Question]:
        """``number`` questions, each about a scene not given before."""
        return [self._question(scene) for scene in self.scenes(number)]

    def _question(self, scene: Scene) -> Question:
        kinds = self._random.integers(0, len(KINDS), 2)
        lines = self._random.choice(list(LINES), 2, replace=False)
        left, right = (Count(KINDS[k], str(line)) for k, line in zip(kinds, lines, strict=True))
        add = bool(self._random.random() < ADD_SHARE)
        if not add and left.of(scene) < right.of(scene):
            left, right = right, left
        return Question(scene, left, right, add)

    def chance(self, share: float) -> bool:
        """True in ``share`` of the calls."""
        return bool(self._random.random() < share)


def prompt(request: str) -> tuple[Message, ...]:
    """The one user turn: the image, then the request."""
    return (Message("user", f"{IMAGE_PLACEHOLDER}\n{request}"),)


def lesson(scene: Scene, request: str, answer: str) -> PreferencePair:
    """A supervised example: an image, what is asked, and what to say."""
    return PreferencePair(prompt(request), (render(scene),), answer, None, source="demo")
