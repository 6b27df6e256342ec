"""The records everything starts from. Frozen, free of torch, each with a JSON round trip."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of the prompt. ``text`` holds one ``<image>`` or ``<video>`` placeholder wherever one stands."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt, a preferred and a rejected response.

    Attributes:
        prompt: the turns before the scored response, images marked by ``<image>`` in order of ``images``.
        images: one source an image: a path, encoded bytes, or a PIL image.
        chosen: the preferred response.
        rejected: the other one; None in supervised fine-tuning data.
        source: name of the data set it belongs to; metrics are also reported by it.
        origin: ``file:line`` it was read from, for messages.
        max_tiles: tiles per pair its data set allows; None leaves it to the recipe.
        metadata: whatever else the record held.
        videos: one source a video, a path or encoded bytes, marked by ``<video>`` in order; read as frames.
    """

    prompt: tuple[Message, ...]
    images: tuple[Any, ...]
    chosen: str
    rejected: str | None
    source: str = "data"
    origin: str = ""
    max_tiles: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    videos: tuple[Any, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; refuses images and videos that are not paths, since JSON has no place for them."""
        for medium in (*self.images, *self.videos):
            if not isinstance(medium, str):
                raise TypeError(f"only paths have a JSON form, this pair holds a {type(medium).__name__}")
        return {
            "prompt": [{"role": m.role, "text": m.text} for m in self.prompt],
            "images": list(self.images),
            "chosen": self.chosen,
            "rejected": self.rejected,
            "source": self.source,
            "origin": self.origin,
            "max_tiles": self.max_tiles,
            "metadata": self.metadata,
            "videos": list(self.videos),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> PreferencePair:
        """Inverse of :meth:`to_json`."""
        fields = dict(record)
        fields["prompt"] = tuple(Message(m["role"], m["text"]) for m in record["prompt"])
        fields["images"], fields["videos"] = tuple(record["images"]), tuple(record.get("videos", ()))
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its true answer: what preference pairs are built from, and what models are tested on.

    Attributes:
        id: unique in its file; by default a hash of the content.
        images: one source an image: a path, encoded bytes, or a PIL image.
        question: the text, ``<image>`` where an image stands (one image and none written: it goes first).
        answer: the truth.
        verifier: how a response is held against it; None leaves it to the recipe.
        split: e.g. ``train`` or ``test``; None where the data have none.
        origin: ``file:line`` it was read from, for messages.
    """

    id: str
    images: tuple[Any, ...]
    question: str
    answer: str
    verifier: str | None = None
    split: str | None = None
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled answer to a question.

    Attributes:
        question_id, sample_index: which sample of which question.
        text: without the end-of-turn token.
        finish_reason: ``stop`` (the model ended its turn) or ``length`` (cut at the token limit).
        model: who answered.
        settings: how it was sampled: temperature, top_p, max_new_tokens, seed, prompt style.
    """

    question_id: str
    sample_index: int
    text: str
    finish_reason: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Response:
        """Inverse of :meth:`to_json`."""
        return cls(**record)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of a response: never a guess.

    Attributes:
        status: ``correct``, ``wrong``, or ``unparsed`` where no final answer could be read from the response.
        parsed: the final answer as read from the response; None when unparsed.
        verifier: the one that decided.
    """

    status: Literal["correct", "wrong", "unparsed"]
    parsed: str | None
    verifier: str
