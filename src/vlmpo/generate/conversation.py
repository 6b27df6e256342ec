"""Puts the same questions to several models, turn by turn; each goes on from its own answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from vlmpo.data.records import IMAGE_PLACEHOLDER, Message
from vlmpo.errors import RecordError
from vlmpo.generate.base import Engine, Generated, GenerationRequest


@dataclass(frozen=True, slots=True)
class Speaker:
    """Holds a model that answers.

    Attributes:
        heading: what its answers are headed by.
        engine: the engine that asks it.
        while_asked: the context in which it is asked, e.g. its adapter switched off.
    """

    heading: str
    engine: Engine
    while_asked: Callable[[], AbstractContextManager[Any]]


class Conversation:
    """Asks every speaker each question, after the turns so far.

    Args:
        speakers: who answers.
        follows: whether a question follows the earlier ones; else each is the first.
    """

    def __init__(self, speakers: Sequence[Speaker], *, follows: bool = True) -> None:
        self.speakers = tuple(speakers)
        self._follows = follows
        self.restart()

    def restart(self) -> None:
        """Forget the turns so far."""
        self._turns: list[tuple[Message, ...]] = [() for _ in self.speakers]
        self._images: tuple[Any, ...] = ()

    def ask(self, question: str, images: Sequence[Any] = ()) -> list[Generated]:
        """Return each speaker's answer; after an error the turns are as before.

        Args:
            question: its text; without an ``<image>`` for each image, they come before it.
            images: the images that this question brings.

        Raises:
            RecordError: the question cannot be asked: an image cannot be read, or the chat template refuses it.
        """
        asked = Message("user", _with_placeholders(question, len(images)))
        shown = (*self._images, *images)
        answers = []
        for speaker, turns in zip(self.speakers, self._turns, strict=True):
            request = GenerationRequest((*turns, asked), shown, n=1, seed=len(turns))
            with speaker.while_asked():
                (result,) = speaker.engine.generate([request])
            if isinstance(result, RecordError):
                raise result
            answers.append(result[0])
        if self._follows:
            self._images = shown
            self._turns = [
                (*turns, asked, Message("assistant", answer.text))
                for turns, answer in zip(self._turns, answers, strict=True)
            ]
        return answers


def _with_placeholders(question: str, images: int) -> str:
    return question if IMAGE_PLACEHOLDER in question else f"{IMAGE_PLACEHOLDER}\n" * images + question
