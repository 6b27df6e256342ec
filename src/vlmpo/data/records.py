"""Define pairs, questions, responses and verdicts, and read their fields from JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from vlmpo.errors import RecordError, VlmpoError, shorten

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
BOM = b"\xef\xbb\xbf"  # UTF-8 byte order mark, which a JSON file may begin with
# How files of images and videos begin, in base64: PNG, JPEG, GIF, RIFF (WebP, AVI), TIFF, BMP, Matroska, MP4.
BASE64_START = r"iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUkqA|TU0AK|Qk[0-3]|GkXfo|AAAA.GZ0eX"
# A JSON parser takes up to 30 times the memory of what it reads, a tokenizer 80 times.
MAX_LINE_BYTES = 16 << 20  # of a record in JSON, the images and videos embedded in it not counted
MAX_TEXT = 1_000_000  # characters of a prompt or a response
MAX_ENCODED_BYTES = 64 << 20  # of an embedded image or video


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of the prompt. ``text`` holds ``<image>`` or ``<video>`` at the place of each image or video."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with a preferred and a rejected response.

    Attributes:
        prompt: turns before the scored response, with an ``<image>`` for each of ``images``, in order.
        images: a path, encoded bytes or a PIL image for each.
        chosen: preferred response.
        rejected: the other response; None in supervised fine-tuning data.
        source: name of its data set, under which metrics are also reported.
        origin: ``file:line`` it was read from, for messages.
        max_tiles: limit of tiles per pair set by its data set; None leaves it to the recipe.
        metadata: all other fields of the record.
        videos: a path or encoded bytes for each ``<video>``, in order; read as frames.
        chosen_complete: False if the chosen response was cut off before the model ended its turn; None if not said.
        rejected_complete: likewise for the rejected response.
        as_sampled: whether the responses are what a model wrote right after its prompt, as ``vlmpo pair`` records them.
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
    chosen_complete: bool | None = None
    rejected_complete: bool | None = None
    as_sampled: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values. Raises TypeError for an image or video that is not a path."""
        for medium in (*self.images, *self.videos):
            if not isinstance(medium, str):
                raise TypeError(f"only paths have a JSON form, this pair holds a {type(medium).__name__}")
        return {
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "prompt": [asdict(message) for message in self.prompt],
            "images": list(self.images),
            "videos": list(self.videos),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> PreferencePair:
        """Return the pair that :meth:`to_json` gave ``record`` for."""
        prompt = tuple(Message(message["role"], message["text"]) for message in record["prompt"])
        media = {"images": tuple(record["images"]), "videos": tuple(record.get("videos", ()))}
        return cls(**{**record, **media, "prompt": prompt})


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its true answer, from which pairs are built or on which a model is evaluated.

    Attributes:
        id: unique in its file; by default a hash of the content.
        images: a path, encoded bytes or a PIL image for each.
        question: text with an ``<image>`` for each image, and a ``<video>`` for each video.
        answer: the true answer.
        verifier: name of the verifier that compares responses with it; None leaves it to the recipe.
        split: e.g. ``train`` or ``test``; None if the data have no splits.
        origin: ``file:line`` it was read from, for messages.
        videos: a path or encoded bytes for each; read as frames.
    """

    id: str
    images: tuple[Any, ...]
    question: str
    answer: str
    verifier: str | None = None
    split: str | None = None
    origin: str = ""
    videos: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled answer to a question.

    Attributes:
        question_id: id of the question.
        sample_index: number of the sample among those of the question.
        text: the answer without its end-of-turn token.
        finish_reason: ``stop`` (the model ended its turn) or ``length`` (cut at the token limit).
        model: name of the model.
        settings: sampling settings: temperature, top_p, max_new_tokens, seed, prompt style.
    """

    question_id: str
    sample_index: int
    text: str
    finish_reason: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Response:
        """Return the response that :meth:`to_json` gave ``record`` for."""
        return cls(**record)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verifier's judgement of a response; never a guess.

    Attributes:
        status: ``correct``, ``wrong``, or ``unparsed`` if no final answer could be read from the response.
        parsed: final answer as read from the response; None if unparsed.
        verifier: name of the verifier that decided.
    """

    status: Literal["correct", "wrong", "unparsed"]
    parsed: str | None
    verifier: str


# ---- fields of JSON records ----


def text_field(record: Mapping[str, Any], key: str, origin: str) -> str:
    """Return the string under ``key``. Raises RecordError ``missing_field``, or see :func:`checked_text`."""
    value = record.get(key)
    if not isinstance(value, str):
        what = f"must be a string, not {json_kind(value)}" if key in record else "is missing"
        raise RecordError("missing_field", origin, f"`{key}` {what}")
    return checked_text(value, key, origin)


def checked_text(value: str, key: str, origin: str) -> str:
    """Return ``value``. Raises RecordError ``bad_json`` if it holds half of a surrogate pair, or ``too_large``."""
    check_length(len(value), f"`{key}`", origin)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud83d" alone is JSON, but no tokenizer takes it
        detail = f"`{key}` holds half of a surrogate pair at character {error.start}; write the whole character"
        raise RecordError("bad_json", origin, detail) from error
    return value


def check_length(characters: int, what: str, origin: str) -> None:
    """Raise RecordError ``too_large`` if a text has more than MAX_TEXT characters."""
    if characters > MAX_TEXT:
        detail = f"{what} has {characters} characters, at most {MAX_TEXT} are read; shorten it or take the record out"
        raise RecordError("too_large", origin, detail)


@contextmanager
def one_record(origin: str, action: str = "reading") -> Iterator[None]:
    """Raise RecordError ``unreadable_record``, which names the kind of exception, for one that is not vlmpo's.

    One record, of which nobody foresaw what it holds, ends no run. For the work on the content of one record only.
    """
    try:
        yield
    except (VlmpoError, MemoryError):
        raise
    except Exception as error:
        detail = f"{action} it raised {type(error).__name__} ({shorten(error)}); mend the record or take it out"
        raise RecordError("unreadable_record", origin, detail) from error


def json_kind(value: Any) -> str:
    """Return the JSON name of a value's type, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
