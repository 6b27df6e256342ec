"""Renders conversations with the model's own chat template: the prompt, and what the model has to write after it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from vlmpo.data.encode.continuations import ends_in_thought
from vlmpo.data.encode.control_tokens import any_of, control_tokens, special_tokens
from vlmpo.data.encode.processors import image_token, reads_images, tokenizer_of
from vlmpo.data.encode.prompt_shape import Items, PromptShape, Turn, find_lost, texts_of, with_probes
from vlmpo.data.records import IMAGE_PLACEHOLDER, Message
from vlmpo.errors import ModelError, RecordError

# A response that no template has a reason to change, to find what the template writes before and after a response.
PROBE = "vlmpo-probe-response"
_QUESTION = "Question?"
_SHOWN = 200  # characters of template text that a notice quotes
_QUOTED = 80  # characters of a record that a message quotes
_KEPT_SHAPES = 1000  # a data set has a few
_SHAPE_OF_ONE: tuple[Turn, ...] = (("user", ("",)),)
# Conversations around which a template shows what it writes.
_CONVERSATIONS: tuple[tuple[Turn, ...], ...] = (
    _SHAPE_OF_ONE,
    (("user", (None, "")),),
    (("system", ("",)), *_SHAPE_OF_ONE),
    (*_SHAPE_OF_ONE, ("assistant", ("",)), *_SHAPE_OF_ONE),
    (("system", ("",)), *_SHAPE_OF_ONE, ("assistant", ("",)), *_SHAPE_OF_ONE),
)


@dataclass(frozen=True, slots=True)
class Rendering:
    """Holds a prompt and its responses as text.

    Attributes:
        prompt: what the model reads before it answers, one image token an image.
        responses: what it has to write for each response, without the end of the turn.
        end_of_turn: what ends its turn, up to and including the end-of-turn token.
    """

    prompt: str
    responses: tuple[str, ...]
    end_of_turn: str


class ChatTemplate:
    """Renders prompts and responses, and refuses those of which the template loses a part.

    Most templates take a message's content as a list of texts and images, those of text-only models and a few others
    as one string. Both forms are tried on a probe, the usual one for the kind of model first.

    Args:
        processor: the model's own processor; a text-only model's tokenizer.

    Attributes:
        control: the model's control tokens, those among them that the template writes.
        opens_thought: whether the model answers within a thought that the template has opened.
        end_of_turn: what ends a response, up to and including the end-of-turn token.
        probe_prompt: a prompt like any other, as the model reads it.

    Raises:
        ModelError: there is no chat template, or none that renders a question and an answer.
    """

    def __init__(self, processor: Any) -> None:
        if getattr(processor, "chat_template", None) is None:
            raise ModelError(
                "the processor has no chat template, so the prompts' layout is unknown; put the model's "
                "chat_template.jinja into its folder, or set processor.chat_template"
            )
        self._processor = processor
        self._tokenizer = tokenizer_of(processor)
        self._image_token = image_token(processor)
        self._special_token = any_of(special_tokens(self._tokenizer))
        self._shapes: dict[tuple[Any, ...], PromptShape | None] = {}
        self._notices: dict[str, str] = {}
        self._choose_form()
        self._look_at_order()
        self._look_at_conversations()

    @property
    def notices(self) -> dict[str, str]:
        """Return what the user should know about the template, each remark once, by kind.

        Nearly all are made on the probe that ``__init__`` renders, before the loader's workers get their copies.
        """
        return dict(self._notices)

    def add_notices(self, notices: Mapping[str, str]) -> None:
        """Add what a copy in another process has found; of each kind the first remark is kept."""
        self._notices = {**notices, **self._notices}

    # ---- what the template does, found out once ----

    def _choose_form(self) -> None:
        """Find out whether the template takes a message's content as a list of items or as a string."""
        failures: list[Exception] = []
        for as_items in (True, False) if reads_images(self._processor) else (False, True):
            self._as_items = as_items
            self._tail: str | None = None  # what the template last wrote after a response: hardly ever changes
            self._notices = {}
            try:
                messages = [self._message("user", self._items(_QUESTION))]
                prompt = self._apply(messages, None, "")
                # The probe's white space is lost if the template trims responses.
                _, tail = self._render_responses(messages, prompt, [f" {PROBE} "], "")
                self.end_of_turn, self.probe_prompt = self._end_of_turn(tail), prompt
                if _QUESTION not in prompt or "'type'" in prompt:  # left out, or the list written as Python writes it
                    raise RecordError("template_refused", "", "it does not write the question")
                return
            except (RecordError, ValueError) as error:
                failures.append(error)
        first = failures[0]
        cause = first.detail if isinstance(first, RecordError) else first
        raise ModelError(f"the chat template cannot render a question and an answer: {cause}") from first

    def _look_at_order(self) -> None:
        """Add a notice if the template moves images before the text."""
        if self._image_token is None or not self._as_items:
            return
        try:
            prompt = self._apply([self._message("user", self._items(f"{_QUESTION}{IMAGE_PLACEHOLDER}"))], None, "")
        except RecordError:  # no text may precede an image: each record with such text is refused
            return
        if -1 < prompt.find(self._image_token) < prompt.find(_QUESTION):
            self._notices["order"] = (
                "the chat template writes a message's images before its text, whatever their places in it"
            )

    def _look_at_conversations(self) -> None:
        """Find out what the template writes around texts of every role that it takes."""
        shapes = [self._shape(turns) for turns in _CONVERSATIONS]
        answered = self._apply([self._message("user", self._items(_QUESTION))], PROBE, "")
        self.control = control_tokens(self._processor, "\n".join([answered, *(s.rendered for s in shapes if s)]))
        alone, shown, after_system = shapes[:3]
        # 0: not known, or not written as the processor names it.
        self._marks_per_image = shown.rendered.count(self._image_token) if shown and self._image_token else 0
        self.opens_thought = alone is not None and ends_in_thought(alone.literals[-1])
        # What a user's turn begins with, if it is text: control tokens are refused, wherever they stand.
        opening = self.control.pattern.split(alone.literals[0])[-1].strip() if alone else ""
        marks = [opening, opening.rpartition("\n")[2]]
        if after_system and len(after_system.literals) == 3:
            marks.append(self.control.pattern.split(after_system.literals[1])[-1])
        is_mark = re.compile(r"\S.*[^\w\s]|[^\w\s].*\S", re.DOTALL)  # not a word alone: "user"
        self._opening_marks = tuple({mark.strip(): None for mark in marks if is_mark.search(mark)})

    def _shape(self, turns: Sequence[Turn]) -> PromptShape | None:
        """Return how the template renders conversations like ``turns``; None if it refuses the one of probes."""
        key = tuple((role, *(item is None for item in items)) for role, items in turns)
        if key not in self._shapes:
            if len(self._shapes) >= _KEPT_SHAPES:
                self._shapes.clear()
            messages = [self._message(role, items) for role, items in with_probes(turns)]
            try:
                self._shapes[key] = PromptShape.of(self._apply(messages, None, ""))
            except Exception:  # the template does not take the probes, of which the user knows nothing
                self._shapes[key] = None
        return self._shapes[key]

    # ---- a record ----

    def render(
        self, prompt: Sequence[Message], responses: Sequence[str], origin: str, as_sampled: Sequence[bool] = ()
    ) -> Rendering:
        """Return the prompt as the model reads it, and each response as the model has to write it.

        The model has to write everything that follows the prompt: the response, and what the template puts before it.
        If the template renders the prompt differently when a response follows, only the response counts.

        Args:
            prompt: the turns before the response.
            responses: the responses.
            origin: ``file:line`` of the record.
            as_sampled: for each response whether it is what the model wrote after the prompt, which no template
                renders; by default none is.

        Raises:
            RecordError: ``template_refused``; ``template_lost_prompt`` if the rendered prompt does not hold one of its
                texts as it is, or an image; ``template_lost_response`` if the rendered text does not hold a response
                (white space at their ends aside).
        """
        turns = [(message.role, self._items(message.text)) for message in prompt]
        messages = [self._message(role, items) for role, items in turns]
        given = self._apply(messages, None, origin)
        self._check_prompt(turns, given, origin)
        self._look_for_marks(prompt)
        sampled = [*as_sampled, *[False] * (len(responses) - len(as_sampled))]
        plain = [response for response, is_sampled in zip(responses, sampled, strict=True) if not is_sampled]
        if not plain:
            return Rendering(given, tuple(responses), self.end_of_turn)
        rendered, tail = self._render_responses(messages, given, plain, origin)
        written = iter(rendered)
        texts = (r if is_sampled else next(written) for r, is_sampled in zip(responses, sampled, strict=True))
        return Rendering(given, tuple(texts), self._end_of_turn(tail))

    def _render_responses(
        self, messages: list[dict[str, Any]], given: str, responses: Sequence[str], origin: str
    ) -> tuple[list[str], str]:
        """Return what follows the prompt ``given`` up to the end of each response, and what follows the responses."""
        finished = [self._apply(messages, response, origin) for response in responses]
        tail = self._tail
        if tail is None or any(not text.endswith(r + tail) for text, r in zip(finished, responses, strict=True)):
            _, probe, tail = self._apply(messages, PROBE, origin).rpartition(PROBE)
            if not probe:
                raise _lost("the chat template leaves responses out", origin)
            self._tail = tail
        written = []
        for response, text in zip(responses, finished, strict=True):
            start = self._response_start(text, response, tail, origin)
            if not text.removesuffix(tail).startswith(given):
                self._note_difference(given, text[:start])
            else:
                lead = text[len(given) : start]
                if lead.strip():
                    self._notices.setdefault(
                        "lead",
                        f"the chat template writes {lead[:_SHOWN]!r} between the prompt and a response; "
                        "the model has to write it too, so it is scored with the response",
                    )
                start = len(given)
            written.append(text.removesuffix(tail)[start:])
        return written, tail

    def _check_prompt(self, turns: Sequence[Turn], given: str, origin: str) -> None:
        """Raise RecordError ``template_lost_prompt`` if a text or an image of the turns is not in the prompt."""
        texts, shape = list(texts_of(turns)), self._shape(turns)
        as_expected = False
        if shape is None:
            lost = find_lost(given, texts, range(len(texts)))
        else:
            lost = shape.left_out(texts)
            as_expected = given == shape.fill(texts) or given == shape.fill([text.strip() for text in texts])
            if lost is None and not as_expected:  # the template changes a text, or writes by what is in one
                lost = find_lost(given, texts, shape.order)
        if lost is not None:
            roles = [role for role, items in turns for item in items if item is not None]
            where = f"the {roles[lost]} turn's {_quoted(texts[lost])}"
            raise _lost_prompt(f"the chat template leaves out or changes {where}", origin)
        images = sum(item is None for _, items in turns for item in items)
        if images and self._image_token is not None and self._marks_per_image:
            shown = (shape.rendered if shape is not None and as_expected else given).count(self._image_token)
            if shown < images * self._marks_per_image:
                detail = f"the chat template writes {shown} {self._image_token} for {images} images: not all are shown"
                raise _lost_prompt(detail, origin)

    def _look_for_marks(self, prompt: Sequence[Message]) -> None:
        """Add a notice if the first user's text begins as the template begins a user's turn: it is templated twice."""
        if "templated" in self._notices:
            return
        text = next((message.text for message in prompt if message.role == "user"), "")
        text = text.replace(IMAGE_PLACEHOLDER, "").lstrip()
        mark = next((mark for mark in self._opening_marks if text.startswith(mark)), None)
        if mark is not None:
            self._notices["templated"] = (
                f"a prompt begins with {mark[:_SHOWN]!r}, as the chat template itself begins a user's turn, and gets "
                "it twice; if the data are templated already, take their turn marks out"
            )

    def _items(self, text: str) -> Items:
        """Return a message's texts and images; a string has nothing but empty texts to lose."""
        if self._as_items:
            return tuple(item.get("text") for item in content_of(text))
        parts = [item for part in text.split(IMAGE_PLACEHOLDER) for item in (None, part)]
        return tuple(item for item in parts[1:] if item != "")

    def _message(self, role: str, items: Items) -> dict[str, Any]:
        """Return a message in the form that the template reads."""
        if self._as_items:
            content = [{"type": "image"} if item is None else {"type": "text", "text": item} for item in items]
            return {"role": role, "content": content}
        # Around an image in a string the template writes nothing, so the user's white space stays.
        image = self._image_token or IMAGE_PLACEHOLDER
        return {"role": role, "content": "".join(image if item is None else item for item in items)}

    def _apply(self, messages: list[dict[str, Any]], response: str | None, origin: str) -> str:
        """Return the conversation as text: up to where the model answers, or with ``response`` as its answer."""
        if response is not None:
            content = [{"type": "text", "text": response}] if self._as_items else response
            messages = [*messages, {"role": "assistant", "content": content}]
        try:
            return self._processor.apply_chat_template(messages, add_generation_prompt=response is None, tokenize=False)
        except (TemplateError, TypeError) as error:
            detail = f"the chat template refuses the conversation: {error}"
            raise RecordError("template_refused", origin, detail) from error

    def _response_start(self, text: str, response: str, tail: str, origin: str) -> int:
        """Return where ``response`` starts in ``text``, which ends in ``tail``; its ends' white space may be gone."""
        body = text.removesuffix(tail)
        if text.endswith(tail) and body.endswith(response):
            return len(body) - len(response)
        body, trimmed = body.rstrip(), response.strip()
        if text.endswith(tail) and body.endswith(trimmed):
            self._notices.setdefault(
                "trim", "the chat template trims white space around responses; they are scored trimmed"
            )
            return len(body) - len(trimmed)
        shown = response if len(response) <= _SHOWN else f"{response[:_SHOWN]}..."
        raise _lost(f"the chat template strips or changes part of the response {shown!r}", origin)

    def _note_difference(self, given: str, answered: str) -> None:
        """Add a notice that quotes how the prompt before an answer differs from the prompt alone."""
        if "prompt" in self._notices:
            return
        start = _common_start(given, answered)
        before, after = given[start:], answered[start:]
        end = _common_start(before[::-1], after[::-1])
        before, after = before[: len(before) - end][:_SHOWN], after[: len(after) - end][:_SHOWN]
        self._notices["prompt"] = (
            f"the chat template renders the prompt differently when a response follows: {before!r} where the model "
            f"is to answer, {after!r} where the answer is given; responses are scored after the former"
        )

    def _end_of_turn(self, tail: str) -> str:
        """Return ``tail`` up to its first special token; the end-of-sequence token if it has none."""
        special = self._special_token.search(tail)
        if special:
            return tail[: special.end()]
        eos = self._tokenizer.eos_token
        if eos is None:
            raise ModelError(
                "no token ends a response: the chat template writes none after it and the tokenizer has no eos_token; "
                "set tokenizer.eos_token"
            )
        self._notices.setdefault(
            "end",
            f"the chat template writes no end-of-turn token after a response; the tokenizer's {eos!r} is scored there",
        )
        return eos


def content_of(text: str) -> list[dict[str, str]]:
    """Return a message's text as content items, with an image item for each ``<image>``.

    The one newline that may follow a placeholder is left out: the template writes its own after an image.
    """
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    items = [{"type": "text", "text": first}] if first else []
    for part in rest:
        items.append({"type": "image"})
        following = part.removeprefix("\n")
        if following:
            items.append({"type": "text", "text": following})
    return items


def check_placeholders(prompt: Sequence[Message], placeholder: str, media: Sequence[Any], origin: str) -> None:
    """Raise RecordError ``placeholder_mismatch`` unless ``prompt`` has a placeholder for each of ``media``."""
    written = sum(message.text.count(placeholder) for message in prompt)
    if written != len(media):
        detail = f"the prompt has {written} {placeholder} for {len(media)} {placeholder.strip('<>')}s"
        raise RecordError("placeholder_mismatch", origin, f"{detail}; write one at the place of each")


def _common_start(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their start."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _lost(what: str, origin: str) -> RecordError:
    remedy = "take it out of the record, or give the processor a chat template that keeps it"
    return RecordError("template_lost_response", origin, f"{what}; {remedy}")


def _lost_prompt(what: str, origin: str) -> RecordError:
    remedy = (
        "write it into the last turn, which this template keeps, or give the processor a chat template that keeps it"
    )
    return RecordError("template_lost_prompt", origin, f"{what}; {remedy}")


def _quoted(text: str) -> str:
    shown = repr(text.strip()[:_QUOTED])
    return shown if len(shown) <= _QUOTED else f"{shown[: _QUOTED - 4]}...{shown[0]}"
