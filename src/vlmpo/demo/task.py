"""Draws the demo's visual task: small drawings of nine cells, and sums over what is counted in them.

A scene is nine cells, each empty or one of three colours times three shapes. A question adds or subtracts two counts,
each over one row or column. A worked answer counts aloud and then computes; a direct answer is its last sentence
alone. Every sentence is words separated by single spaces, so that a word-level tokenizer reproduces it exactly; a cell
is one word, so that the model has to look once to name it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
LINES = {  # name: the three cells it holds, of nine counted row by row
    **{f"{name}-row": (3 * i, 3 * i + 1, 3 * i + 2) for i, name in enumerate(("top", "middle", "bottom"))},
    **{f"{name}-column": (i, i + 3, i + 6) for i, name in enumerate(("left", "middle", "right"))},
}
CELL_PIXELS = 16
IMAGE_PIXELS = 3 * CELL_PIXELS
EMPTY_SHARE = 0.25
ADD_SHARE = 0.65
LARGEST_ANSWER = 6
SOURCE = "demo"  # the data set's name in the metrics

Scene = tuple[str, ...]  # nine entries of CELLS, row by row


@cache
def _tile(cell: str) -> np.ndarray:
    """Draw one cell: uint8 ``[16, 16, 3]``. The circle is hollow: a filled one is too much like a square to learn."""
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
    """Draw the scene as a 48x48 RGB image. Different scenes have different images."""
    rows = [np.concatenate([_tile(cell) for cell in scene[start : start + 3]], axis=1) for start in (0, 3, 6)]
    return Image.fromarray(np.concatenate(rows, axis=0))


@dataclass(frozen=True, slots=True)
class Count:
    """Counts one of KINDS over one of LINES."""

    kind: str
    line: str

    def __str__(self) -> str:
        return f"{self.kind} in {self.line}"

    def matches(self, cell: str) -> bool:
        """Return whether ``cell`` is of the kind that is counted."""
        if cell == EMPTY or self.kind == "shapes":
            return cell != EMPTY
        return self.kind.removesuffix("-shapes").removesuffix("s") in cell.split("-")

    def of(self, scene: Scene) -> int:
        """Return the count, 0 to 3."""
        return sum(self.matches(scene[place]) for place in LINES[self.line])

    def aloud(self, scene: Scene) -> str:
        """Write the counting, cell before number: ``red-shapes in top-row: red-circle 1 empty 1 red-square 2 .``."""
        words: list[str] = []
        for place in LINES[self.line]:
            total = int(words[-1]) if words else 0
            words += [scene[place], str(total + self.matches(scene[place]))]
        return f"{self}: {' '.join(words)} ."


@dataclass(frozen=True, slots=True)
class Question:
    """Adds or subtracts two counts over one scene; a difference is never negative."""

    scene: Scene
    left: Count
    right: Count
    add: bool

    @property
    def text(self) -> str:
        """Return the user's request."""
        return f"Count {self.left} {'plus' if self.add else 'minus'} {self.right} ."

    @property
    def truth(self) -> int:
        """Return the right answer, 0 to LARGEST_ANSWER."""
        left, right = self.left.of(self.scene), self.right.of(self.scene)
        return left + right if self.add else left - right

    @property
    def direct(self) -> str:
        """Return the answer alone."""
        return f"Final answer: {self.truth} ."

    @property
    def worked(self) -> str:
        """Return the answer that counts aloud, computes, and ends as the direct one."""
        left, right = self.left.of(self.scene), self.right.of(self.scene)
        computed = f"{left} {'+' if self.add else '-'} {right} = {self.truth} ."
        return f"{self.left.aloud(self.scene)} {self.right.aloud(self.scene)} {computed} {self.direct}"


@dataclass(frozen=True, slots=True)
class Lesson:
    """Holds a supervised example: a scene, the request and the answer."""

    scene: Scene
    request: str
    answer: str


class Lessons:
    """Holds supervised examples as pairs; an image is drawn when its example is read."""

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        self.lessons = lessons

    def __len__(self) -> int:
        return len(self.lessons)

    def __getitem__(self, index: int) -> PreferencePair:
        lesson = self.lessons[index]
        return PreferencePair(prompt(lesson.request), (render(lesson.scene),), lesson.answer, None, SOURCE)


def prompt(request: str) -> tuple[Message, ...]:
    """Return the one user turn: the image, then the request."""
    return (Message("user", f"{IMAGE_PLACEHOLDER}\n{request}"),)


class SceneSource:
    """Draws scenes, never the same one twice, so that no two splits share an image.

    Args:
        seed: of everything drawn; the draws also depend on the order of the calls.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._drawn: set[Scene] = set()

    def scene(self) -> Scene:
        """Draw a scene not drawn before."""
        while True:
            empty = self._random.random(9) < EMPTY_SHARE
            filled = self._random.integers(1, len(CELLS), 9)
            scene = tuple(CELLS[0 if e else f] for e, f in zip(empty, filled, strict=True))
            if scene not in self._drawn:
                self._drawn.add(scene)
                return scene

    def question(self) -> Question:
        """Draw a question about a new scene, over two different lines."""
        scene = self.scene()
        kinds = self._random.integers(0, len(KINDS), 2)
        left, right = (Count(KINDS[k], line) for k, line in zip(kinds, self._lines()[:2], strict=True))
        add = bool(self._random.random() < ADD_SHARE)
        if not add and left.of(scene) < right.of(scene):
            left, right = right, left
        return Question(scene, left, right, add)

    def questions(self, number: int) -> list[Question]:
        """Draw ``number`` questions."""
        return [self.question() for _ in range(number)]

    def captions(self, number: int) -> list[Lesson]:
        """Draw descriptions of all six lines, in the request's order: ``top-row: empty blue-square empty . ...``."""
        lessons = []
        for _ in range(number):
            scene, lines = self.scene(), self._lines()
            descriptions = [f"{line}: {' '.join(scene[place] for place in LINES[line])} ." for line in lines]
            lessons.append(Lesson(scene, f"Describe {' and '.join(lines)} .", " ".join(descriptions)))
        return lessons

    def answers(self, number: int, direct_sums: float = 0.0, direct_differences: float = 0.0) -> list[Lesson]:
        """Draw answered questions; these shares of the sums and differences are answered directly, the rest worked."""
        lessons = []
        for question in self.questions(number):
            direct = self._random.random() < (direct_sums if question.add else direct_differences)
            lessons.append(Lesson(question.scene, question.text, question.direct if direct else question.worked))
        return lessons

    def _lines(self) -> list[str]:
        """Return the names of all lines in random order."""
        names = list(LINES)
        return [names[index] for index in self._random.permutation(len(names))]
