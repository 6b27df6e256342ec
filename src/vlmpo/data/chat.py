"""Conversations through the model's own chat template: what a model is given, and what it then has to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from vlmpo.data.records import IMAGE_PLACEHOLDER, Message
from vlmpo.errors import ModelError, RecordError

# A response no template has a reason to change: it shows what the template writes before and after any response.
PROBE = "vlmpo-probe-response"
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

    Args:
        processor: the model's own processor.

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
        self._end_token = _any_special_token(processor.tokenizer)
        self._said: set[str] = set()
        self.notices: list[str] = []
        try:
            # White space around the probe shows whether the template trims responses.
            self.render([Message("user", "Question?")], [f" {PROBE} "], "")
        except (RecordError, TypeError, ValueError) as error:
            cause = error.detail if isinstance(error, RecordError) else error
            raise ModelError(f"the chat template cannot render a question and an answer: {cause}") from error

    def render(self, prompt: Sequence[Message], responses: Sequence[str], origin: str) -> Rendering:
        """The prompt as the model is given it, and each response as the model has to write it.

        A reply is all that the template adds to the prompt: the response, and before it whatever the template puts
        there. Where the template renders the prompt differently when a response follows, the reply is the response.

        Raises:
            RecordError: ``template_refused``, or ``template_lost_response`` when a response is not in the rendered
                text as it is (white space at its ends aside).
        """
        messages = [{"role": message.role, "content": content_of(message.text)} for message in prompt]
        given = self._apply(messages, None, origin)
        _, probe, tail = self._apply(messages, PROBE, origin).rpartition(PROBE)
        if not probe:
            raise _lost("the chat template leaves responses out", origin)
        replies = []
        for response in responses:
            head, reply = self._locate(self._apply(messages, response, origin), response, tail, origin)
            if (head + reply).startswith(given):
                self._tell_lead(head[len(given) :])
                replies.append((head + reply)[len(given) :])
            else:
                self._tell_difference(given, head)
                replies.append(reply)
        return Rendering(given, tuple(replies), self._end_of_turn(tail))

    def _apply(self, messages: list[dict[str, Any]], response: str | None, origin: str) -> str:
        """The conversation as text: up to where the model answers, or with ``response`` as its answer."""
        turns = list(messages)
        if response is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
        try:
            return self._processor.apply_chat_template(turns, add_generation_prompt=response is None, tokenize=False)
        except TemplateError as error:
            raise RecordError(
                "template_refused", origin, f"the chat template refuses the conversation: {error}"
            ) from error

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
        eos = self._processor.tokenizer.eos_token
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
