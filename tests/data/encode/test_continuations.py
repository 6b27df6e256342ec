"""What a model wrote after its prompt is scored as it stands, and what was cut off without an end of turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.paths import SHARED
from tests.zoo.templates import OPENING, STYLES, processor
from vlmpo.data.encode.continuations import closes_unopened, ends_in_thought, readings
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import RecordError

CASE = SHARED / "reports" / "cases" / "thought_cut.jsonl"
THOUGHT = "I count three.\n</think>\n\nThree"
CUT = "I count one and then I"


def pair(chosen: str, rejected: str, **fields: Any) -> PreferencePair:
    return PreferencePair((Message("user", "How many?"),), (), chosen, rejected, origin="pairs.jsonl:7", **fields)


def encoded(style: str, chosen: str, rejected: str, **fields: Any) -> EncodedPair:
    return PairEncoder(processor(style)).encode(pair(chosen, rejected, **fields))


def texts(style: str, chosen: str, rejected: str, **fields: Any) -> tuple[str, str]:
    """The scored texts, which follow the prompt as the template leaves it."""
    found = encoded(style, chosen, rejected, **fields)
    decode = processor(style).tokenizer.decode
    assert decode(found.prompt_ids).endswith(STYLES[style].opening)
    assert found.rejected_ids is not None
    return decode(found.chosen_ids), decode(found.rejected_ids)


def ids(style: str, text: str) -> list[int]:
    """The ids of ``text`` right after the prompt, as the tokenizer reads them; alone if a token would span both."""
    tokens, opening = processor(style).tokenizer, STYLES[style].opening
    before, whole, alone = (tokens(t, add_special_tokens=False).input_ids for t in (opening, opening + text, text))
    return whole[len(before) :] if whole[: len(before)] == before else alone


# ---- as sampled ----


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("text", [" red \n", "\n\nred", "<think>\nred?\n</think>\n\nred", THOUGHT, "red circles"])
def test_what_was_sampled_is_scored_as_it_stands(style: str, text: str) -> None:
    """Whatever the template would do to an answer: trim it, strip its thought, write something before it."""
    end = STYLES[style].end
    found = encoded(style, text, "blue", as_sampled=True)
    assert found.chosen_ids.tolist() == ids(style, text + end)
    assert found.rejected_ids.tolist() == ids(style, "blue" + end)
    assert not found.cut


@pytest.mark.parametrize("style", STYLES)
def test_what_was_cut_off_has_no_end_of_turn(style: str) -> None:
    end = STYLES[style].end
    found = encoded(style, "red", CUT, as_sampled=True, rejected_complete=False)
    assert found.chosen_ids.tolist() == ids(style, "red" + end)
    assert found.rejected_ids.tolist() == ids(style, CUT)
    assert found.cut
    both = encoded(style, "red", CUT, as_sampled=True, chosen_complete=False, rejected_complete=True)
    assert both.chosen_ids.tolist() == ids(style, "red")
    assert both.rejected_ids.tolist() == ids(style, CUT + end)


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "mistral"])
def test_a_record_may_say_so_without_having_been_sampled(style: str) -> None:
    """The template still renders the response: here a space before it, there a trimmed one."""
    lead = " " if style == "mistral" else ""
    assert texts(style, "red", "blue", rejected_complete=False) == (f"{lead}red{STYLES[style].end}", f"{lead}blue")
    assert texts(style, "red", "blue", chosen_complete=False) == (f"{lead}red", f"{lead}blue{STYLES[style].end}")


def test_half_a_character_at_the_cut_is_not_scored() -> None:
    assert texts("chatml", "red", "blue \ufffd", as_sampled=True, rejected_complete=False)[1] == "blue "
    assert texts("chatml", "red", "blue \ufffd", as_sampled=True)[1] == "blue \ufffd<|im_end|>"


def test_over_long_still_cuts_both() -> None:
    whole = encoded("chatml", "red", CUT, as_sampled=True, rejected_complete=False)
    limit = len(whole.prompt_ids) + 2
    encoder = PairEncoder(processor("chatml"), max_length=limit, over_long="cut")
    short = encoder.encode(pair("red", CUT, as_sampled=True, rejected_complete=False))
    assert short.rejected_ids.tolist() == whole.rejected_ids[:2].tolist()
    assert short.length == limit


def test_a_cut_response_is_another_than_the_finished_one() -> None:
    assert texts("chatml", "red", "red", rejected_complete=False) == ("red<|im_end|>", "red")
    for flags in ({}, {"chosen_complete": False, "rejected_complete": False}):
        with pytest.raises(RecordError, match="identical"):
            encoded("chatml", "red", "red", **flags)
    with pytest.raises(RecordError, match="empty_response"):
        encoded("chatml", "red", " \n", rejected_complete=False)


# ---- a prompt that opens a thought, and a record that says nothing ----


@pytest.mark.parametrize("style", OPENING)
def test_a_continuation_makes_its_pair_one(style: str) -> None:
    end = STYLES[style].end
    assert PairEncoder(processor(style)).opens_thought
    assert texts(style, THOUGHT, CUT) == (THOUGHT + end, CUT)
    assert texts(style, CUT, THOUGHT) == (CUT, THOUGHT + end)
    assert texts(style, THOUGHT, f"{CUT} see two.</think>Two") == (THOUGHT + end, f"{CUT} see two.</think>Two{end}")
    assert texts(style, THOUGHT, CUT, rejected_complete=True) == (THOUGHT + end, CUT + end)
    assert texts(style, THOUGHT, CUT, chosen_complete=False) == (THOUGHT, CUT)


@pytest.mark.parametrize("style", OPENING)
def test_plain_answers_go_through_the_template(style: str) -> None:
    assert texts(style, "three", "one ") == (f"three{STYLES[style].end}", f"one {STYLES[style].end}")
    with pytest.raises(RecordError, match="template_lost_response"):  # its template strips thoughts
        encoded(style, "<think>x</think>three", "one")


@pytest.mark.parametrize("style", OPENING)
def test_a_response_that_opens_its_thought_itself_is_no_continuation(style: str) -> None:
    with pytest.raises(RecordError, match="template_lost_response"):
        encoded(style, THOUGHT, "<think>\nTwo?\n</think>\n\nTwo")


@pytest.mark.parametrize("style", OPENING)
def test_in_supervised_training_the_chosen_response_is_scored_the_same(style: str) -> None:
    alone = PairEncoder(processor(style), need_rejected=False)
    for chosen, rejected in ((THOUGHT, CUT), (CUT, THOUGHT), ("three", "one")):
        both = encoded(style, chosen, rejected)
        assert alone.encode(pair(chosen, rejected)).chosen_ids.tolist() == both.chosen_ids.tolist()


def test_without_an_opened_thought_a_stray_mark_changes_nothing() -> None:
    assert not PairEncoder(processor("chatml")).opens_thought
    assert texts("chatml", THOUGHT, CUT) == (THOUGHT + "<|im_end|>", CUT + "<|im_end|>")
    with pytest.raises(RecordError, match="template_lost_response"):
        encoded("strips thoughts", THOUGHT, CUT)


def test_a_thought_in_the_question_opens_none() -> None:
    asked = PreferencePair((Message("user", "What does <think> mean?"),), (), THOUGHT, CUT)
    found = PairEncoder(processor("chatml")).encode(asked)
    assert processor("chatml").tokenizer.decode(found.rejected_ids) == CUT + "<|im_end|>"


@pytest.mark.skipif(not CASE.exists(), reason="no ../shared/reports/cases")
@pytest.mark.parametrize("style", OPENING)
def test_the_reported_case(style: str) -> None:
    record = json.loads(CASE.read_text())
    end = STYLES[style].end
    assert texts(style, record["chosen"], record["rejected"]) == (THOUGHT + end, CUT)


# ---- by themselves ----


@pytest.mark.parametrize(
    ("text", "unopened"),
    [
        ("a</think>b", True),
        ("</think>", True),
        ("a</think>b<think>c</think>", True),
        ("<think>a</think>b", False),
        ("a<think>b", False),
        ("a", False),
        ("", False),
    ],
)
def test_closing_what_was_not_opened(text: str, unopened: bool) -> None:
    assert closes_unopened(text) is unopened


@pytest.mark.parametrize(
    ("text", "open_"), [("assistant\n<think>\n", True), ("<think>\n\n</think>\n\n", False), ("assistant\n", False)]
)
def test_ending_in_a_thought(text: str, open_: bool) -> None:
    assert ends_in_thought(text) is open_


def test_readings_of_supervised_data() -> None:
    alone = PreferencePair((), (), THOUGHT, None)
    assert readings(alone, opens_thought=True)[0] == (True, True)
    assert readings(alone, opens_thought=False)[0] == (False, True)
