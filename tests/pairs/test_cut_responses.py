"""Pairs of responses that were cut off, in a thought or not: what their records say, and how these are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.pairs.test_pairs import Q, answers, made, say
from tests.zoo.templates import OPENING, STYLES, processor
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.records import Message, PreferencePair
from vlmpo.generate.base import Generated, GenerationRequest
from vlmpo.pairs.correctness import pair_correctness
from vlmpo.pairs.dropout_ntp import pair_dropout_ntp

THOUGHT = "I count three.\n</think>\n\n"


def test_only_what_was_cut_off_is_marked() -> None:
    responses = answers("q", say("3"), say("4"), say("5") + "...", "I count one...", "I cannot say how many there are.")
    records, _ = pair_correctness([Q], responses)
    marked = {record["rejected"]: record.get("rejected_complete") for record in records}
    assert marked == {say("4"): None, say("5"): False, "I count one": False, responses[4].text: None}
    assert not any("chosen_complete" in record for record in records)
    assert [list(record) for record in records if "rejected_complete" in record] == [
        [*list(records[0]), "rejected_complete"]
    ] * 2


def test_what_was_cut_off_is_never_counted_as_wrong() -> None:
    _, report = pair_correctness([Q], answers("q", say("4") + "...", say("5") + "..."))
    assert (report.verdicts, report.outcomes) == ({"unparsed": 2}, {"unreadable": 1})
    _, report = pair_correctness([Q], answers("q", say("3"), say("4") + "...", say("5")))
    assert report.verdicts == {"correct": 1, "unparsed": 1, "wrong": 1}
    assert report.pairs == {"wrong": 1, "format": 1}
    _, report = pair_correctness([Q], answers("q", say("3") + "...", say("4")))
    assert report.dropped == {"unfinished": 1}
    assert not report.pairs


# ---- in a thought that the prompt opened ----


def thinking(*texts: str, **settings: Any) -> Any:
    return answers("q", *texts, settings=settings)


def test_no_answer_is_read_in_a_thought_that_was_never_closed() -> None:
    """A server does not say that its template opens one; that the responses close what they never opened does."""
    inside, other = "So it is 3.\nFinal answer: 3", "So it is 4.\nFinal answer: 4"
    responses = thinking(THOUGHT + say("3"), THOUGHT + say("5"), inside + "...", other + "...", inside + " I think")
    records, report = pair_correctness([Q], responses)
    assert report.verdicts == {"correct": 1, "wrong": 1, "unparsed": 3}
    assert made(records) == {
        (THOUGHT + say("3"), THOUGHT + say("5"), "wrong"),
        (THOUGHT + say("3"), inside, "format"),
        (THOUGHT + say("3"), other, "format"),
        (THOUGHT + say("3"), inside + " I think", "format"),
    }
    cut = {record["rejected"] for record in records if record.get("rejected_complete") is False}
    assert cut == {inside, other}


def test_the_local_engine_says_so_itself() -> None:
    """Where every response was cut there is nothing to compare with."""
    marked = [
        dataclasses.replace(response, settings={**response.settings, "in_thought": True})
        for response in thinking(say("3") + "...", say("3", "Sure."))
    ]
    records, report = pair_correctness([Q], [*marked, *answers("p", say("3"))])
    assert (records, report.verdicts) == ([], {"unparsed": 2})


@pytest.mark.parametrize("stray", [say("4") + "</think>", "</think>" + say("4")])
def test_a_stray_mark_makes_no_thought_of_the_others(stray: str) -> None:
    responses = thinking(say("3"), say("4"), say("5"), stray)
    _, report = pair_correctness([Q], responses)
    assert report.verdicts["correct"] == 1
    assert report.verdicts["wrong"] >= 2


def test_a_thought_that_the_model_opens_is_read_as_before() -> None:
    own = "<think>\nI count.\n</think>\n\n"
    _, report = pair_correctness([Q], thinking(own + say("3"), own + say("4"), "<think>\n" + say("3") + "..."))
    assert report.verdicts == {"correct": 1, "wrong": 1, "unparsed": 1}


@pytest.mark.parametrize("style", [*OPENING, "chatml"])
def test_the_records_are_scored_as_they_were_sampled(style: str) -> None:
    records, _ = pair_correctness([Q], thinking(THOUGHT + say("3"), "I count one and then I..."))
    (record,) = records
    # What reading a pair file makes of it: `question_id`, `kind` and `settings` say that it was sampled.
    pair = PreferencePair(
        (Message("user", "how many?"),),
        (),
        record["chosen"],
        record["rejected"],
        rejected_complete=record["rejected_complete"],
        as_sampled={"question_id", "kind", "settings"} <= record.keys(),
    )
    encoded, decode = PairEncoder(processor(style)).encode(pair), processor(style).tokenizer.decode
    assert encoded.rejected_ids is not None
    assert decode(encoded.prompt_ids).endswith(STYLES[style].opening)
    assert decode(encoded.chosen_ids) == THOUGHT + say("3") + STYLES[style].end
    assert decode(encoded.rejected_ids) == "I count one and then I"


# ---- DropoutNTP ----


class Continues:
    """An engine that remembers its requests and continues all of them alike."""

    name, batch_size, notices = "m", 4, []

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[list[Generated]]:
        self.requests += requests
        yield from ([Generated(" and blue.", "stop")] for _ in requests)


@pytest.mark.parametrize(
    ("text", "in_thinking"),
    [
        ("There are two red circles.", False),
        ("I count two red ones.\n</think>\n\nTwo.", True),
        ("<think>\nI count two.\n</think>\n\nTwo red circles.", True),
        ("<think>\nI count and never stop", True),
    ],
)
def test_a_turn_with_a_thought_is_continued_as_one(text: str, in_thinking: bool) -> None:
    engine = Continues()
    question = dataclasses.replace(Q, answer="")  # nobody knows whether it is right
    records, _ = pair_dropout_ntp([question], answers("q", text), engine)  # type: ignore[arg-type]
    (request,) = engine.requests
    assert request.in_thinking is in_thinking
    assert text.startswith(request.prefix)
    assert [record["rejected"] for record in records] == [f"{request.prefix} and blue."]
    assert not {"rejected_complete", "chosen_complete"} & records[0].keys()
