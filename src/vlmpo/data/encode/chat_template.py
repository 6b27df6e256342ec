"""Renders conversations with the model's own chat template: the prompt, and what the model has to write after it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from vlmpo.data.encode.processors import image_token, reads_images, tokenizer_of
from vlmpo.data.records import IMAGE_PLACEHOLDER, Message
from vlmpo.errors import ModelError, RecordError

# A response that no template has a reason to change, to find what the template writes before and after a response.
PROBE = "vlmpo-probe-response"
_QUESTION = "Question?"
_SHOWN = 200  # characters of template text that a notice quotes


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
        self._special_token = _any_special_token(self._tokenizer)
        self._choose_form()
        self._look_at_order()

    @property
    def notices(self) -> list[str]:
        """Return what the user should know about the template, each remark once.

        Nearly all are made on the probe that ``__init__`` renders, before the loader's workers get their copies.
        """
        return list(self._notices.values())

    def _choose_form(self) -> None:
        """Find out whether the template takes a message's content as a list of items or as a string."""
        failures: list[Exception] = []
        for as_items in (True, False) if reads_images(self._processor) else (False, True):
            self._as_items = as_items
            self._tail: str | None = None  # what the template last wrote after a response: hardly ever changes
            self._notices: dict[str, str] = {}
            try:
                # The probe's white space is lost if the template trims responses.
                prompt = self.render([Message("user", _QUESTION)], [f" {PROBE} "], "").prompt
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
            prompt = self._apply([self._message("user", f"{_QUESTION}{IMAGE_PLACEHOLDER}")], None, "")
        except RecordError:  # no text may precede an image: each record with such text is refused
            return
        if -1 < prompt.find(self._image_token) < prompt.find(_QUESTION):
            self._notices["order"] = (
                "the chat template writes a message's images before its text, whatever their places in it"
            )

    def render(self, prompt: Sequence[Message], responses: Sequence[str], origin: str) -> Rendering:
        """Return the prompt as the model reads it, and each response as the model has to write it.

        The model has to write everything that follows the prompt: the response, and what the template puts before it.
        If the template renders the prompt differently when a response follows, only the response counts.

        Raises:
            RecordError: ``template_refused``, or ``template_lost_response`` if the rendered text does not hold a
                response as it is (white space at its ends aside).
        """
        messages = [self._message(message.role, message.text) for message in prompt]
        given = self._apply(messages, None, origin)
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
        return Rendering(given, tuple(written), self._end_of_turn(tail))

    def _message(self, role: str, text: str) -> dict[str, Any]:
        """Return a message in the form that the template reads."""
        if self._as_items:
            return {"role": role, "content": content_of(text)}
        # Around an image in a string the template writes nothing, so the user's white space stays.
        return {"role": role, "content": text.replace(IMAGE_PLACEHOLDER, self._image_token or IMAGE_PLACEHOLDER)}

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


def _any_special_token(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches any special token, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {*map(str, tokenizer.all_special_tokens), *(token.content for token in added if token.special)}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _common_start(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their start."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _lost(what: str, origin: str) -> RecordError:
    remedy = "take it out of the record, or give the processor a chat template that keeps it"
    return RecordError("template_lost_response", origin, f"{what}; {remedy}")
