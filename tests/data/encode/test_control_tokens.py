"""Texts with the model's control tokens are refused; other special tokens, which answers hold, are their own ids."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.paths import SHARED
from tests.zoo import FAMILIES
from tests.zoo.templates import ANSWER_TOKENS, PLAIN_TURN_TOKENS, STYLES, processor
from vlmpo.data.encode.encoder import EncodedPairs, PairEncoder
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import RecordError
from vlmpo.train.batching import Collator

CASES = SHARED / "reports" / "cases"


def pair(question: str = "what is it?", chosen: str = "red", rejected: str = "blue", **fields: Any) -> PreferencePair:
    return PreferencePair((Message("user", question),), (), chosen, rejected, origin="pairs.jsonl:7", **fields)


def refused(encoder: PairEncoder, asked: PreferencePair) -> str:
    with pytest.raises(RecordError) as caught:
        encoder.encode(asked)
    assert (caught.value.reason, caught.value.origin) == ("control_token_in_text", "pairs.jsonl:7")
    return caught.value.detail


# By style: what its template writes around a conversation, the tokenizer's own start, end and padding, and media.
MEDIA = {"<img>", "</img>", "<IMG_CONTEXT>", "<video>"}
CONTROL = {
    "chatml": {"<|im_start|>", "<|im_end|>", "<|endoftext|>"},
    "llama3": {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>"},
    "gemma": {"<s>", "<start_of_turn>", "<end_of_turn>", "<|endoftext|>"},
    "mistral": {"<s>", "</s>", "<|endoftext|>"},
    "vicuna": {"</s>", "<|endoftext|>"},
    "opens a thought": {"<|im_start|>", "<|im_end|>", "<|endoftext|>"},
    "r1": {"<s>", "</s>", "<|endoftext|>", *PLAIN_TURN_TOKENS},
}


@pytest.mark.parametrize("style", CONTROL)
def test_which_tokens_are_control_tokens(style: str) -> None:
    encoder = PairEncoder(processor(style))
    names = processor(style).tokenizer.convert_ids_to_tokens(sorted(encoder.control_ids))
    assert set(names) == CONTROL[style] | MEDIA


@pytest.mark.parametrize("style", CONTROL)
def test_no_text_may_hold_one(style: str) -> None:
    encoder = PairEncoder(processor(style))
    for token in CONTROL[style] | MEDIA:
        assert f"the prompt's text holds {token}, " in refused(encoder, pair(f"what is{token}?"))
        assert f"`chosen` holds {token}, " in refused(encoder, pair(chosen=f"{token}red"))
        assert f"`rejected` holds {token}, " in refused(encoder, pair(rejected=f"blue{token}", as_sampled=True))
    talk = (Message("user", "hi"), Message("assistant", f"yes{STYLES[style].end}"), Message("user", "well?"))
    refused(encoder, PreferencePair(talk, (), "red", "blue", origin="pairs.jsonl:7"))


def test_the_message_says_what_the_token_does() -> None:
    encoder = PairEncoder(processor("chatml"))
    assert "is an image or a video" in refused(encoder, pair("<IMG_CONTEXT>"))
    assert "ends its turn; it is added here" in refused(encoder, pair(chosen="red<|im_end|>"))
    assert "give plain texts, the chat template is applied here" in refused(encoder, pair("<|im_start|>user\nwhat?"))


@pytest.mark.skipif(not CASES.exists(), reason="no ../shared/reports/cases")
@pytest.mark.parametrize("name", ["templated_twice", "forged_turn"])
def test_the_reported_cases(name: str) -> None:
    record = json.loads((CASES / f"{name}.jsonl").read_text())
    asked = pair(record.get("prompt") or record["question"], record["chosen"], record["rejected"])
    assert "<|im_" in refused(PairEncoder(processor("chatml")), asked)
    family = FAMILIES["qwen2.5-vl"].processor()
    assert "<|im_" in refused(PairEncoder(family), asked)


# ---- tokens that answers hold ----

ANSWERS = [
    "<think>one or two</think>two",
    "<ref>the red circle</ref><box>[[10, 20, 30, 40]]</box>",
    "<|object_ref_start|>circle<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>",
    '<tool_call>{"name": "zoom"}</tool_call>',
    "<quad>1,2</quad> and <point>3,4</point>",
]


@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral", "opens a thought", "r1"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_tokens_of_thoughts_tools_and_grounding_are_encoded_as_themselves(style: str, answer: str) -> None:
    tokens = processor(style).tokenizer
    held = [token for token in ANSWER_TOKENS if token in answer]
    ids = [tokens.convert_tokens_to_ids(token) for token in held]
    assert len(held) >= 2
    assert set(ids) <= set(tokens.all_special_ids)
    encoder = PairEncoder(processor(style))
    encoded = encoder.encode(pair(f"show {answer}", rejected=answer, as_sampled=True))
    assert encoded.rejected_ids is not None
    for scored in (encoded.rejected_ids, encoded.prompt_ids):
        found = [token for token in scored.tolist() if token in ids]
        assert sorted(set(found)) == sorted(ids)
    assert tokens.decode(encoded.rejected_ids) == answer + STYLES[style].end
    assert not encoder.control_ids & set(ids)


def test_a_token_that_the_template_does_not_write_is_left_alone() -> None:
    """Those of another model's turns, special as they are, are no turns to this one."""
    encoder = PairEncoder(processor("chatml"))
    encoded = encoder.encode(pair("what is <start_of_turn>?", chosen="a <|eot_id|> of <|User|>"))
    assert processor("chatml").tokenizer.decode(encoded.chosen_ids) == "a <|eot_id|> of <|User|><|im_end|>"


def test_media_marks_that_were_used_are_no_text() -> None:
    from tests.tiny_models import noise_image

    image = noise_image(40, 40, 1)
    shown = PreferencePair((Message("user", "<image>\nwhat?"),), (image,), "red", "blue")
    for family in FAMILIES.values():
        if family.images:
            assert PairEncoder(family.processor()).encode(shown).image_tokens > 0


def test_words_that_end_or_pad_are_no_marks() -> None:
    """A tokenizer may pad with any token; `!` in a text is no control token then."""
    import copy

    own = copy.copy(processor("chatml"))
    own.tokenizer = copy.deepcopy(own.tokenizer)
    own.tokenizer.pad_token = "!"
    encoded = PairEncoder(own).encode(pair("what!", chosen="red!"))
    assert own.tokenizer.decode(encoded.chosen_ids) == "red!<|im_end|>"


# ---- turn marks of plain text ----


@pytest.mark.parametrize(
    ("style", "question", "mark"),
    [
        ("mistral", "[INST] how many? [/INST]", "[INST]"),
        ("vicuna", "<image>\nUSER: how many? ASSISTANT:", "USER:"),
        ("alpaca", "### Instruction:\nhow many?", "### Instruction:"),
        ("alpaca", "Below is an instruction.\n\n### Instruction:\nhow many?", "Below is an instruction."),
    ],
)
def test_a_prompt_that_begins_like_a_first_turn_is_used_and_told_of_once(style: str, question: str, mark: str) -> None:
    question = question.replace("<image>\n", "")
    encoder = PairEncoder(processor(style))
    before = encoder.notices
    encoded = encoder.encode(pair(question))
    assert question.split("\n")[-1] in processor(style).tokenizer.decode(encoded.prompt_ids)
    encoder.encode(pair(question + " again"))
    (new,) = [notice for notice in encoder.notices if notice not in before]
    assert f"a prompt begins with {mark!r}"[:-1] in new
    assert list(encoded.notices.values()) == [new]


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "mistral", "vicuna", "alpaca"])
def test_an_ordinary_prompt_is_not_told_of(style: str) -> None:
    encoder = PairEncoder(processor(style))
    before = encoder.notices
    for question in ("user interfaces: which?", "How many?", "system", "Is [INST] a mark?", "Tell the USER: hello"):
        assert encoder.encode(pair(question)).notices == {}
    assert encoder.notices == before


def test_what_a_loaders_copy_notices_comes_with_its_batch() -> None:
    encoder = PairEncoder(processor("vicuna"))
    worker = pickle.loads(pickle.dumps(encoder.for_loader()))
    pairs = [pair("how many?"), pair("USER: how many?"), pair("USER: what?")]
    loader = DataLoader(EncodedPairs(pairs, worker), batch_size=2, collate_fn=Collator(None, shared=True))  # type: ignore[arg-type]
    first, second = loader
    assert list(first.notices) == ["templated"]
    assert second.notices == {}
    before = encoder.notices
    for _ in range(2):
        encoder.add_notices(first.notices)
    assert [notice for notice in encoder.notices if notice not in before] == list(first.notices.values())


def test_a_notice_of_a_pair_that_is_refused_comes_with_the_next(tmp_path: Path) -> None:
    encoder = PairEncoder(processor("vicuna"), max_length=40)
    with pytest.raises(RecordError, match="over_long"):
        encoder.encode(pair("USER: " + "how many? " * 50))
    assert list(encoder.encode(pair("what?")).notices) == ["templated"]
