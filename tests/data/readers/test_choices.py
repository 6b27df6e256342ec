"""Choices of questions: shown as lettered lines, the answer named by letters; media and other keys of questions."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.readers.test_questions import write
from vlmpo.data.readers.questions import QuestionSet, read_questions
from vlmpo.data.records import Question
from vlmpo.errors import RecordError
from vlmpo.pairs.records import question_record
from vlmpo.verifiers.verifiers import verify

COLOURS = ["red", "blue", "green"]


def read(folder: Path, *records: Any, **options: Any) -> QuestionSet:
    return read_questions(write(folder, *records), **options)


def asked(folder: Path, **record: Any) -> Question:
    found = read(folder, {"question": "Which?", **record})
    assert found.dropped == []
    return found.questions[0]


def fault(folder: Path, **record: Any) -> RecordError:
    found = read(folder, {"question": "Which?", **record})
    assert found.questions == []
    return found.dropped[0]


# --- what is shown


@pytest.mark.parametrize("key", ["choices", "options"])
@pytest.mark.parametrize(
    "choices",
    [
        COLOURS,
        {"A": "red", "B": "blue", "C": "green"},
        {"a": "red", "b": "blue", "c": "green"},
        {"A": "red", "B": "blue", "C": "green", "D": None},
        json.dumps(COLOURS),
        str(COLOURS),
        json.dumps({"A": "red", "B": "blue", "C": "green"}),
        ["A. red", "B. blue", "C. green"],
        ["(a) red", "(b) blue", "(c) green"],
    ],
)
def test_choices_are_lettered_lines(tmp_path: Path, key: str, choices: Any) -> None:
    for answer in (1, "B", "b", "(B)", "B."):
        question = asked(tmp_path, image="a.png", answer=answer, **{key: choices})
        assert question.question == "<image>\nWhich?\nA. red\nB. blue\nC. green"
        assert question.answer == "B"
    for answer in ("blue", "Blue", " blue.", "B. blue", "(b) blue"):
        assert asked(tmp_path, answer=answer, **{key: choices}).answer == "B. blue"


@pytest.mark.parametrize(
    "text",
    [
        "Which?\nA. red\nB. blue\nC. green",
        "Which? (a) Red (b) Blue (c) Green",
        "Which of A) red, B) blue, C) green is it?",
        "A: red\nB: blue\nC: green\nWhich?",
    ],
)
def test_what_the_question_holds_is_not_shown_twice(tmp_path: Path, text: str) -> None:
    question = asked(tmp_path, question=text, choices=COLOURS, answer=2)
    assert (question.question, question.answer) == (text, "C")


@pytest.mark.parametrize("text", ["Is it red, blue or green?", "Answer with A, B or C.", "What did J. Smith see?"])
def test_texts_or_letters_alone_are_not_enough(tmp_path: Path, text: str) -> None:
    shown = asked(tmp_path, question=text, choices=COLOURS, answer=0).question
    assert shown == f"{text}\nA. red\nB. blue\nC. green"


@pytest.mark.parametrize("text", ["(A) blue (B) red (C) green", "A. redder\nB. blue\nC. green", "a) 1 b) 2 c) 3"])
def test_a_question_with_other_letters_is_refused(tmp_path: Path, text: str) -> None:
    error = fault(tmp_path, question=text, choices=COLOURS, answer=0)
    assert (error.reason, "letters its options otherwise" in error.detail) == ("ambiguous_field", True)


def test_choices_may_be_numbers_and_nothing(tmp_path: Path) -> None:
    assert asked(tmp_path, choices=[10, 2.50, "many"], answer="10").question.endswith("A. 10\nB. 2.5\nC. many")
    assert read(tmp_path, '{"question": "Which?", "choices": [0.50, 1e3], "answer": "0.50"}').questions[0].answer == (
        "A. 0.50"
    )
    for nothing in (None, [], "", {}, [None]):
        question = asked(tmp_path, choices=nothing, answer=1)
        assert (question.question, question.answer) == ("Which?", "1")


def test_images_among_the_choices_count(tmp_path: Path) -> None:
    question = asked(tmp_path, image=["a.png", "b.png"], choices=["<image>", "<image>"], answer=1)
    assert (question.question, len(question.images)) == ("Which?\nA. <image>\nB. <image>", 2)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ("red, blue", "is a text that holds no list (red, blue)"),
        (3, "must be a list or an object, not a number"),
        ({"first": "red"}, "not of first"),
        ({"A": "red", "a": "blue"}, "not of A, a"),
        ([["red"]], "`choices[A]` must be a text or a number, not a list"),
        (["red", None], "`choices[B]` must be a text or a number, not null"),
        ([True, False], "not true or false"),
        ([str(at) for at in range(27)], "more than letters"),
        ("[" * 5000, "holds no list"),
    ],
)
def test_choices_in_another_form_are_refused(tmp_path: Path, choices: Any, words: str) -> None:
    error = fault(tmp_path, choices=choices, answer="red")
    assert (error.reason, words in error.detail) == ("missing_field", True)
    assert len(error.detail) < 250


def test_two_lists_of_choices_must_be_the_same(tmp_path: Path) -> None:
    assert asked(tmp_path, choices=COLOURS, options=json.dumps(COLOURS), answer=1).answer == "B"
    assert fault(tmp_path, choices=COLOURS, options=COLOURS[:2], answer=1).reason == "ambiguous_field"


# --- what the answer becomes


@pytest.mark.parametrize(
    ("choices", "answer", "truth"),
    [
        (COLOURS, 0, "A"),
        (COLOURS, 2, "C"),
        (COLOURS, "A, C", "A, C"),
        ([1, 2, 3], "1", "A. 1"),
        (["3.0", "4"], "3", "A. 3.0"),
        (["1/2", "3√5"], "3√5", "B. 3√5"),
        ({"A": "red", "C": "green"}, 2, "C"),
    ],
)
def test_an_answer_becomes_a_letter(tmp_path: Path, choices: Any, answer: Any, truth: str) -> None:
    assert asked(tmp_path, choices=choices, answer=answer).answer == truth


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        ([1, 2, 3], 1),
        (["2", "1"], 1),
        ([0, 10, 20], 10),
        (["1.0", "7"], 1),
        (["B", "A"], "B"),
        (["red", "Red"], "red"),
    ],
)
def test_an_answer_with_two_meanings_is_refused(tmp_path: Path, choices: Any, answer: Any) -> None:
    assert fault(tmp_path, choices=choices, answer=answer).reason == "ambiguous_answer"


@pytest.mark.parametrize(
    "answer", [3, -1, 10**30, 1.5, "yellow", "D", "1", "A. blue", "A, D", "red or blue", "x" * 500]
)
def test_an_answer_that_is_no_choice_is_refused(tmp_path: Path, answer: Any) -> None:
    error = fault(tmp_path, choices=COLOURS, answer=answer)
    assert error.reason == "answer_not_a_choice"
    assert "x" * 81 not in error.detail


def test_an_index_that_the_object_leaves_out_is_refused(tmp_path: Path) -> None:
    assert fault(tmp_path, choices={"A": "red", "C": "green"}, answer=1).reason == "answer_not_a_choice"


def test_letters_are_judged_against_the_letters(tmp_path: Path) -> None:
    for answer in (1, "B", "(b)"):
        truth = asked(tmp_path, choices=COLOURS, answer=answer).answer
        assert verify("Final answer: B", truth).status == "correct"
        assert verify("Final answer: C", truth).status == "wrong"


def test_easy_and_hard_questions_are_read_as_they_were(tmp_path: Path) -> None:
    before = asked(tmp_path, image="a.png", choices=COLOURS, answer="blue", id="q1")
    again = read(tmp_path, question_record(before)).questions[0]
    assert (again.question, again.answer, again.images) == (before.question, before.answer, before.images)


# --- numbers


@pytest.mark.parametrize("written", ["1e3", "0.50", "-0", "1E+2", "3", "12345678901234567890123", "1" * 5000, "2.0"])
def test_a_number_keeps_its_form(tmp_path: Path, written: str) -> None:
    found = read(tmp_path, f'{{"question": "How many?", "answer": {written}}}')
    assert [question.answer for question in found.questions] == [written]


@pytest.mark.parametrize("written", ["007", "1e3", " 0.50"])
def test_a_text_keeps_its_form(tmp_path: Path, written: str) -> None:
    assert asked(tmp_path, answer=written).answer == written


# --- media and other keys


@pytest.mark.parametrize(
    "media",
    [
        {"images": ["a.png"]},
        {"images": "a.png"},
        {"image_path": "a.png"},
        {"img": "a.png"},
        {"image": {"path": "a.png"}},
    ],
)
def test_images_of_questions_are_read_as_those_of_pairs(tmp_path: Path, media: dict[str, Any]) -> None:
    question = asked(tmp_path, answer="red", **media)
    assert (question.images, question.question) == ((str(tmp_path / "a.png"),), "<image>\nWhich?")


@pytest.mark.parametrize("media", [{"images": [None]}, {"image": ""}, {"images": [{"path": None}]}])
def test_questions_without_an_image(tmp_path: Path, media: dict[str, Any]) -> None:
    assert asked(tmp_path, answer="red", **media).question == "Which?"


def test_videos_and_embedded_images_of_questions(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"looked at, not opened")
    question = asked(tmp_path, answer="red", video="v.mp4")
    assert (question.videos, question.question) == ((str(tmp_path / "v.mp4"),), "<video>\nWhich?")
    assert question_record(question)["video"] == str(tmp_path / "v.mp4")
    assert fault(tmp_path, answer="red", videos=["none.mp4"]).reason == "missing_video"
    encoded = base64.b64encode(b"\x89PNG").decode()
    question = asked(tmp_path, answer="red", image=f"data:image/png;base64,{encoded}")
    assert question.images == (b"\x89PNG",)
    assert asked(tmp_path, **question_record(question)).images == (b"\x89PNG",)


@pytest.mark.parametrize("record", [{"imgae": "a.png"}, {"file_name": "a.png"}, {"media": ["a.mp4"]}])
def test_media_of_questions_that_nobody_reads(tmp_path: Path, record: dict[str, Any]) -> None:
    assert fault(tmp_path, answer="red", **record).reason == "unread_media"


def test_keys_of_questions_that_are_not_read_are_counted(tmp_path: Path) -> None:
    whole = {"id": 1, "image": "a.png", "question": "Q?", "choices": ["a", "b"], "answer": 1, "split": "x"}
    found = read(tmp_path, {**whole, "hint": "h", "n": 1}, {"question": "R?", "answer": "1", "hint": "i", "empty": ""})
    assert found.unread == {"hint": 2, "n": 1}
    assert found.unread_notice() == "keys of the questions that are not read nor shown to the model: hint (2), n (1)"


def test_a_key_given_twice_in_a_question(tmp_path: Path) -> None:
    found = read(tmp_path, '{"question": "Q?", "answer": "a", "answer": "b"}', '{"question": "Q?", "answer": "a"}')
    assert ([error.reason for error in found.dropped], len(found.questions)) == (["ambiguous_field"], 1)
