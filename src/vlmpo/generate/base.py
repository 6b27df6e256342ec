"""Defines engines: they take requests, each a prompt and a number of samples, and return responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from vlmpo.data.encode.continuations import THOUGHT_OPEN
from vlmpo.data.records import Message
from vlmpo.errors import RecordError


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Holds one prompt and how many responses to generate for it.

    Attributes:
        messages: the turns so far, with ``<image>`` at the place of each image.
        images: one source an image: a path, encoded bytes, or a PIL image.
        n: number of responses.
        seed: from 0. Response ``i`` depends on it and on ``i``, not on the other requests.
        prefix: beginning of the model's turn, which the model continues; the texts returned do not contain it.
        origin: ``file:line`` of the question, for messages.
        in_thinking: whether ``prefix`` is the beginning of a turn with a thought, open or closed.
        videos: a path or encoded bytes for each ``<video>``; read as frames.
    """

    messages: tuple[Message, ...]
    images: tuple[Any, ...]
    n: int
    seed: int
    prefix: str = ""
    origin: str = ""
    in_thinking: bool = False
    videos: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """Holds one response.

    Attributes:
        text: without the end of the turn.
        finish_reason: ``stop`` if the model ended its turn, ``length`` if the response was cut off.
        in_thought: whether all of it is thought: the prompt opened one that was never closed. False if not known.
    """

    text: str
    finish_reason: str
    in_thought: bool = False

    @property
    def judged_text(self) -> str:
        """Return the text as a verifier is to read it: it finds no final answer in a thought."""
        return judged_text(self.text, self.in_thought)


def judged_text(text: str, in_thought: bool) -> str:
    """Return a response as a verifier is to read it, the thought that its prompt opened and it never closed marked."""
    return THOUGHT_OPEN + text if in_thought else text


@dataclass(frozen=True, slots=True)
class Sampling:
    """Holds how a token is drawn from the model's distribution, which is not changed in any other way.

    Attributes:
        temperature: at 0, the most likely token is taken.
        top_p: keep the fewest of the most likely tokens that together have this probability.
        max_new_tokens: limit on a response's tokens, end of turn included.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024


Item = TypeVar("Item")
# All responses to a request, or why it cannot be processed, e.g. because an image cannot be read.
Result = list[Generated] | RecordError


class Engine(Protocol):
    """Answers requests.

    Attributes:
        name: the model that answers, for the records.
        batch_size: number of requests processed together. Only the same groups give exactly the same responses again.
        notices: remarks for the user, each once.
    """

    name: str
    batch_size: int

    @property
    def notices(self) -> list[str]: ...

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[Result]:
        """Yield the responses to each request, or its error, in order, as they are ready."""
        ...


def incomplete_batches(items: Sequence[Item], batch_size: int, is_done: Callable[[Item], bool]) -> list[Item]:
    """Return the items of every batch in which at least one item is not done, in order.

    A batch is generated whole even if a part of it is done: in a batch of another shape, logits differ in their last
    bits, and a response could differ from the one an uninterrupted run gives.
    """
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    return [item for batch in batches if not all(map(is_done, batch)) for item in batch]
