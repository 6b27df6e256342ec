"""A text or an image of the prompt that the chat template leaves out or changes is noticed, not what it moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.tiny_models import noise_image
from tests.zoo import FAMILIES, Family
from tests.zoo.templates import STYLES, processor
from vlmpo.data.encode.chat_template import ChatTemplate
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import RecordError

IMAGE = noise_image(40, 40, 1)
SYSTEM, QUESTION, ANSWER = ("system", "Answer in French."), ("user", "How many?"), ("assistant", "Three.")


def pair(*turns: tuple[str, str], **fields: Any) -> PreferencePair:
    prompt = tuple(Message(role, text) for role, text in turns)
    images = (IMAGE,) * sum(text.count("<image>") for _, text in turns)
    return PreferencePair(prompt, images, "Trois", "three", origin="pairs.jsonl:7", **fields)


def under(template: str) -> Any:
    """The tiny processor under a template of its own."""
    own = copy.copy(processor("chatml"))
    own.chat_template = template
    return own


def lost(own: Any, asked: PreferencePair) -> str:
    with pytest.raises(RecordError) as caught:
        PairEncoder(own).encode(asked)
    assert (caught.value.reason, caught.value.origin) == ("template_lost_prompt", "pairs.jsonl:7")
    assert "give the processor a chat template that keeps " in caught.value.detail
    return caught.value.detail


def prompt_of(style: str, asked: PreferencePair) -> str:
    encoder = PairEncoder(processor(style))
    return processor(style).tokenizer.decode(encoder.encode(asked).prompt_ids)


# ---- whole texts that are left out ----


@pytest.mark.parametrize(
    ("style", "turns", "role", "missing"),
    [
        ("no system", [SYSTEM, QUESTION], "system", "Answer in French."),
        ("no system", [("system", "a"), ("user", "a banana")], "system", "a"),  # the text occurs elsewhere
        ("last turn", [SYSTEM, QUESTION], "system", "Answer in French."),
        ("last turn", [QUESTION, ANSWER, ("user", "Sure?")], "user", "How many?"),
        ("no history", [QUESTION, ANSWER, ("user", "Sure?")], "assistant", "Three."),
        ("no history", [QUESTION, ("assistant", "Su"), ("user", "Sure?")], "assistant", "Su"),
        ("first text", [("user", "Look: <image>\nHow many?")], "user", "How many?"),
        ("first text", [("user", "e<image>\nHow many?<image>e")], "user", "How many?"),
    ],
)
def test_a_text_that_is_left_out_is_named(style: str, turns: list[tuple[str, str]], role: str, missing: str) -> None:
    assert f"leaves out or changes the {role} turn's {missing!r}; " in lost(processor(style), pair(*turns))


@pytest.mark.parametrize("style", ["no system", "last turn", "no history", "first text"])
def test_what_such_templates_keep_is_used(style: str) -> None:
    opening = STYLES[style].opening
    assert prompt_of(style, pair(QUESTION)) == f"<|im_start|>user\nHow many?<|im_end|>\n{opening}"
    assert prompt_of(style, pair(("user", "<image>\nHow many?"))).endswith(f"How many?<|im_end|>\n{opening}")


def test_a_blank_text_is_no_loss() -> None:
    assert prompt_of("no system", pair(("system", " \n"), QUESTION)) == prompt_of("no system", pair(QUESTION))
    assert prompt_of("first text", pair(("user", "How many?<image> ")))
    assert prompt_of("last turn", pair(("system", ""), QUESTION)) == prompt_of("last turn", pair(QUESTION))


def test_a_message_quotes_at_most_80_characters() -> None:
    detail = lost(processor("no system"), pair(("system", "Be brief. " * 200), QUESTION))
    quoted = detail.split("system turn's ")[1].split(";")[0]
    assert len(quoted) == 80
    assert quoted.startswith("'Be brief. Be brief.")
    assert quoted.endswith("...'")


# ---- texts that are changed ----

TEXT = "c['text'] }}"


@pytest.mark.parametrize(
    ("change", "turns", "role"),
    [
        ("c['text'].split('</think>')[-1]", [QUESTION, ("assistant", "<think>x</think>\nSix"), QUESTION], "assistant"),
        ("c['text'] | truncate(20)", [("user", "How many of them are there?")], "user"),
        ("c['text'] | replace('colour', 'color')", [("user", "Which colour?")], "user"),
        ("c['text'] | replace('m', 'M')", [QUESTION], "user"),
        ("c['text'] | escape", [("user", "Is 1 < 2?")], "user"),
        ("c['text'].split('\\n')[0]", [("system", "One.\nTwo."), QUESTION], "system"),
        ("(c['text'] if c['text'] | length < 10)", [SYSTEM, QUESTION], "system"),
    ],
)  # fmt: skip
def test_a_text_that_is_changed_is_named(change: str, turns: list[tuple[str, str]], role: str) -> None:
    if role != "assistant":
        change = f"({change} if m['role'] != 'assistant' else c['text'])"
    own = under(STYLES["chatml"].template.replace("c['text']", change))
    assert f"the {role} turn's " in lost(own, pair(*turns))


def test_what_such_a_template_leaves_alone_is_used() -> None:
    own = under(STYLES["chatml"].template.replace("c['text']", "c['text'].split('</think>')[-1]"))
    encoder = PairEncoder(own)
    encoded = encoder.encode(pair(QUESTION, ANSWER, ("user", "Sure?")))
    assert own.tokenizer.decode(encoded.prompt_ids) == (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nThree.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


# ---- images ----

ONE_IMAGE_A_TURN = STYLES["chatml"].template.replace(
    "{% for c in m['content'] %}",
    "{% if m['content'] | selectattr('type', 'equalto', 'image') | list %}<IMG_CONTEXT>\n{% endif %}"
    "{% for c in m['content'] if c['type'] == 'text' %}",
)
IN_USER_TURNS = STYLES["chatml"].template.replace(
    "c['type'] == 'image'", "c['type'] == 'image' and m['role'] == 'user'"
)
IN_USER_TURNS = IN_USER_TURNS.replace("{% else %}{{ c['text'] }}", "{% elif c['type'] == 'text' %}{{ c['text'] }}")
LAST_IMAGES = IN_USER_TURNS.replace("m['role'] == 'user' %}<", "m['role'] == 'user' %}<").replace(
    "m['role'] == 'user'", "m == messages[-1]"
)


@pytest.mark.parametrize(
    ("template", "turns", "shown", "given"),
    [
        (ONE_IMAGE_A_TURN, [("user", "<image><image>Same?")], 1, 2),
        (IN_USER_TURNS, [("system", "Like <image>"), ("user", "<image>How many?")], 1, 2),
        (IN_USER_TURNS, [("user", "Draw."), ("assistant", "<image>"), QUESTION], 0, 1),
        (LAST_IMAGES, [("user", "<image>One?"), ANSWER, ("user", "<image>And here?")], 1, 2),
    ],
)
def test_an_image_that_is_never_shown_is_noticed(
    template: str, turns: list[tuple[str, str]], shown: int, given: int
) -> None:
    detail = lost(under(template), pair(*turns))
    assert f"writes {shown} <IMG_CONTEXT> for {given} images" in detail


def test_an_image_of_which_no_token_is_left_is_noticed() -> None:
    """A processor that does not count: its template writes no mark that it knows."""

    class Lax:
        def __init__(self) -> None:
            self.__dict__.update(under(STYLES["chatml"].template.replace("<IMG_CONTEXT>\n", "(picture)")).__dict__)

        def __getattr__(self, name: str) -> Any:
            return getattr(processor("chatml"), name)

        def apply_chat_template(self, *arguments: Any, **settings: Any) -> str:
            return processor("chatml").apply_chat_template(*arguments, chat_template=self.chat_template, **settings)

        def __call__(self, **arguments: Any) -> Any:
            return processor("chatml")(**{**arguments, "images": None})

    assert "writes none of its images" in lost(Lax(), pair(("user", "<image>How many?")))


# ---- what is no loss ----


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_families_keep_what_they_render(family: Family) -> None:
    """Earlier turns, white space and several texts; a family may refuse a turn by name, but none is lost."""
    image = "<image>" if family.images else ""
    encoder = PairEncoder(family.processor())
    encoder.encode(pair(("user", f" look {image}\n\nhow many? \n"), ANSWER, ("user", "\n Sure?")))


def test_a_system_text_may_stand_in_a_users_turn() -> None:
    talk = (SYSTEM, QUESTION, ANSWER, ("user", "Sure?"))
    assert prompt_of("gemma", pair(*talk)) == (
        "<s><start_of_turn>user\nAnswer in French.\n\nHow many?<end_of_turn>\n<start_of_turn>model\nThree."
        "<end_of_turn>\n<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert prompt_of("mistral", pair(*talk)) == (
        "<s>[INST] How many? [/INST] Three.</s>[INST] Answer in French.\n\nSure? [/INST]"
    )


def test_trimming_dates_and_images_first_are_no_loss() -> None:
    assert prompt_of("llama3", pair(("user", " How many?\n"))) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nOn 26 Jul 2024. How many?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    image = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>\n"
    assert prompt_of("images first", pair(("user", "Look: <image>\nHow many?"))) == (
        f"<|im_start|>user\n{image}Look: How many?<|im_end|>\n<|im_start|>assistant\n"
    )
    clock = under("{{ strftime_now('%f') }}" + STYLES["chatml"].template)  # another text at every rendering
    assert PairEncoder(clock).encode(pair(SYSTEM, QUESTION, ANSWER, QUESTION)).prompt_ids.numel()
    strips = under(STYLES["chatml"].template.replace("c['text']", "c['text'].strip('\\n')"))
    assert PairEncoder(strips).encode(pair(("user", "\nHow many? \n"))).prompt_ids.numel()


def test_what_a_template_refuses_is_still_refused() -> None:
    own = under(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + STYLES["chatml"].template
    )
    with pytest.raises(RecordError, match="template_refused"):
        PairEncoder(own).encode(pair(SYSTEM, QUESTION))


def test_a_conversation_of_a_known_shape_is_rendered_no_more_often_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[Any] = []
    plain = ChatTemplate._apply

    def counting(self: ChatTemplate, messages: Any, *rest: Any) -> str:
        rendered.append(messages)
        return plain(self, messages, *rest)

    encoder = PairEncoder(processor("llama3"))
    encoder.encode(pair(SYSTEM, QUESTION))
    monkeypatch.setattr(ChatTemplate, "_apply", counting)
    encoder.encode(pair(("system", "Be brief. "), ("user", "And\nnow?")))
    assert len(rendered) == 3  # the prompt, and with either response
    encoder.encode(pair(("system", "Be brief."), ("user", "<image>And now?")))
    assert len(rendered) == 3 + 4  # of a new shape
