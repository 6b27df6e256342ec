"""Conversations through the model's own chat template: what a model is given, and what it then has to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from vlmpo.data.encode.processors import image_token, reads_images, tokenizer_of
from vlmpo.data.records import IMAGE_PLACEHOLDER, Message
from vlmpo.errors import ModelError, RecordError

# A response no template has a reason to change: it shows what the template writes before and after any response.
PROBE = "vlmpo-probe-response"
_QUESTION = "Question?"
_SHOWN = 200  # characters of template text a notice quotes


@dataclass(frozen=True, slots=True)
class Rendering:
    """A prompt and its responses as text.

    Attributes:
        prompt: what the model is given before it answers, one image token an image.
        replies: what it has to write for each response, without the end of the turn.
        end_of_turn: what ends its turn, up to and including the end-of-turn token.
    """

    prompt: str
    replies: tuple[str, ...]
    end_of_turn: str


class ChatTemplate:
    """Renders prompts and responses, and refuses what the template loses.

    Templates of text-only models, and a few others, want a message's content as one string, most others as a list of
    texts and images. The probe tells: the usual form of the kind of model goes first, and the one that renders is kept.

    Args:
        processor: the model's own processor; a text-only model's tokenizer.

    Attributes:
        notices: what the user should know about the template, each said once. Nearly all of it shows on a probe that
            is rendered here already, so that a copy in a data loader's worker has nothing new to say.

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
        self._end_token = _any_special_token(self._tokenizer)
        self._choose_form()
        self._look_at_order()

    def _choose_form(self) -> None:
        """Find out whether the template takes a message's content as a list of items or as a string."""
        failures: list[Exception] = []
        for as_items in (True, False) if reads_images(self._processor) else (False, True):
            self._as_items = as_items
            self._tail: str | None = None  # as last probed: nearly always the next conversation's too
            self._said: set[str] = set()
            self.notices: list[str] = []
            try:
                # White space around the probe shows whether the template trims responses.
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
        """Tell where the template does not leave images where they stand."""
        if self._image_token is None or not self._as_items:
            return
        try:
            prompt = self._apply([self._turn("user", f"{_QUESTION}{IMAGE_PLACEHOLDER}")], None, "")
        except RecordError:  # it takes no text before an image: told of the record that has some
            return
        if -1 < prompt.find(self._image_token) < prompt.find(_QUESTION):
            self._notice("order", "the chat template writes a message's images before its text, wherever they stand")

    def render(self, prompt: Sequence[Message], responses: Sequence[str], origin: str) -> Rendering:
        """The prompt as the model is given it, and each response as the model has to write it.

        A reply is all that the template adds to the prompt: the response, and before it whatever the template puts
        there. Where the template renders the prompt differently when a response follows, the reply is the response.

        Raises:
            RecordError: ``template_refused``, or ``template_lost_response`` when a response is not in the rendered
                text as it is (white space at its ends aside).
        """
        messages = [self._turn(message.role, message.text) for message in prompt]
        given = self._apply(messages, None, origin)
        whole = [self._apply(messages, response, origin) for response in responses]
        tail = self._tail
        if tail is None or any(not full.endswith(text + tail) for full, text in zip(whole, responses, strict=True)):
            tail = self._tail = self._probed_tail(messages, origin)
        replies = []
        for response, full in zip(responses, whole, strict=True):
            head, reply = self._locate(full, response, tail, origin)
            if (head + reply).startswith(given):
                self._tell_lead(head[len(given) :])
                replies.append((head + reply)[len(given) :])
            else:
                self._tell_difference(given, head)
                replies.append(reply)
        return Rendering(given, tuple(replies), self._end_of_turn(tail))

    def _probed_tail(self, messages: list[dict[str, Any]], origin: str) -> str:
        """What the template writes after a response to ``messages``."""
        _, probe, tail = self._apply(messages, PROBE, origin).rpartition(PROBE)
        if not probe:
            raise _lost("the chat template leaves responses out", origin)
        return tail

    def _apply(self, messages: list[dict[str, Any]], response: str | None, origin: str) -> str:
        """The conversation as text: up to where the model answers, or with ``response`` as its answer."""
        turns = list(messages)
        if response is not None:
            content = [{"type": "text", "text": response}] if self._as_items else response
            turns.append({"role": "assistant", "content": content})
        try:
            return self._processor.apply_chat_template(turns, add_generation_prompt=response is None, tokenize=False)
        except (TemplateError, TypeError) as error:
            raise RecordError(
                "template_refused", origin, f"the chat template refuses the conversation: {error}"
            ) from error

    def _turn(self, role: str, text: str) -> dict[str, Any]:
        """A message as the template takes it."""
        if self._as_items:
            return {"role": role, "content": content_of(text)}
        # As a string it writes nothing of its own around an image: what the user wrote there stays.
        return {"role": role, "content": text.replace(IMAGE_PLACEHOLDER, self._image_token or IMAGE_PLACEHOLDER)}

    def _locate(self, full: str, response: str, tail: str, origin: str) -> tuple[str, str]:
        """``full`` without ``tail``, split where ``response`` begins, which is checked to be there."""
        body = full.removesuffix(tail)
        if full.endswith(tail) and body.endswith(response):
            return body.removesuffix(response), response
        trimmed = response.strip()
        if full.endswith(tail) and body.rstrip().endswith(trimmed):
            self._notice("trim", "the chat template trims white space around responses; they are scored trimmed")
            start = len(body.rstrip()) - len(trimmed)
            return body[:start], body[start:]
        shown = response if len(response) <= _SHOWN else f"{response[:_SHOWN]}..."
        raise _lost(f"the chat template strips or changes part of the response {shown!r}", origin)

    def _tell_lead(self, lead: str) -> None:
        if lead.strip():
            self._notice(
                "lead",
                f"the chat template writes {lead[:_SHOWN]!r} between the prompt and a response; "
                "the model has to write it too, so it is scored with the response",
            )

    def _tell_difference(self, given: str, head: str) -> None:
        before, after = _difference(given, head)
        self._notice(
            "prompt",
            f"the chat template renders the prompt differently when a response follows: {before!r} where the model "
            f"is to answer, {after!r} where the answer is given; responses are scored after the former",
        )

    def _end_of_turn(self, tail: str) -> str:
        """``tail`` up to its first special token; the tokenizer's end-of-sequence token where it has none."""
        found = self._end_token.search(tail)
        if found:
            return tail[: found.end()]
        eos = self._tokenizer.eos_token
        if eos is None:
            raise ModelError(
                "no token ends a response: the chat template writes none after it and the tokenizer has no eos_token; "
                "set tokenizer.eos_token"
            )
        self._notice(
            "end",
            f"the chat template writes no end-of-turn token after a response; the tokenizer's {eos!r} is scored there",
        )
        return eos

    def _notice(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self.notices.append(text)


def content_of(text: str) -> list[dict[str, str]]:
    """A message's text as content items: ``<image>``, with the one newline that may follow it, is an image item.

    The template writes its own newline after an image, so the text's must not stay.
    """
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    items = [{"type": "text", "text": first}] if first else []
    for part in rest:
        items.append({"type": "image"})
        following = part.removeprefix("\n")
        if following:
            items.append({"type": "text", "text": following})
    return items


def _any_special_token(tokenizer: Any) -> re.Pattern[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    tokens |= {token.content for token in added if token.special}
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _difference(one: str, other: str) -> tuple[str, str]:
    """The parts in which two texts differ: what is left between their common start and their common end."""
    start = _common_start(one, other)
    one, other = one[start:], other[start:]
    end = _common_start(one[::-1], other[::-1])
    return one[: len(one) - end][:_SHOWN], other[: len(other) - end][:_SHOWN]


def _common_start(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _lost(what: str, origin: str) -> RecordError:
    remedy = "take it out of the record, or give the processor a chat template that keeps it"
    return RecordError("template_lost_response", origin, f"{what}; {remedy}")
