"""Files of questions, and how a question is put."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from tests.paths import SHARED
from vlmpo.data.readers.questions import read_questions
from vlmpo.data.records import Question
from vlmpo.errors import DataError, RecipeError
from vlmpo.generate.prompts import prompt_text

EASY_VQA = SHARED / "data" / "easy_vqa"


def write(folder: Path, *records: Any) -> Path:
    """A file of records (strings are written as they are), beside it the images a.png and b.png."""
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"looked at, not opened")
    file = folder / "q.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return file


def test_a_file_as_people_write_it(tmp_path):
    file = write(
        tmp_path,
        {"id": "first", "image": "a.png", "question": "What?", "answer": "red", "verifier": "exact", "split": "test"},
        "",
        {"id": 7, "image": ["a.png", "b.png"], "question": "<image> or <image>?", "answer": 3},
        {"question": "1.5 + 1?", "answer": 2.5, "image": None, "note": "kept out"},
    )
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    found = read_questions(file)
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    third_id = blake2b(b'["1.5 + 1?", "2.5", []]', digest_size=8).hexdigest()
    assert found.questions == [
        Question("first", (a,), "<image>\nWhat?", "red", "exact", "test", f"{file}:1"),
        Question("7", (a, b), "<image> or <image>?", "3", None, None, f"{file}:3"),
        Question(third_id, (), "1.5 + 1?", "2.5", None, None, f"{file}:4"),
    ]
    assert found.dropped == []


def test_the_default_id_depends_on_the_content_alone(tmp_path):
    record = {"image": "a.png", "question": "What?", "answer": "red"}
    ids = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {**record, "question": "padding"}, {**record, "verifier": "exact"})
        ids.add(read_questions(tmp_path / name / "q.jsonl").questions[1].id)
    assert len(ids) == 1
    for change in ({"image": "b.png"}, {"question": "Why?"}, {"answer": "blue"}):
        write(tmp_path, {**record, **change})
        ids.add(read_questions(tmp_path / "q.jsonl").questions[0].id)
    assert len(ids) == 4


@pytest.mark.parametrize(
    ("record", "reason", "words"),
    [
        ('{"question": "no end', "bad_json", "not valid JSON"),
        ("[1]", "bad_json", "holds a list"),
        ({"answer": "1"}, "missing_field", "`question` is missing"),
        ({"question": " ", "answer": "1"}, "missing_field", "`question` is empty"),
        ({"question": "What?"}, "missing_field", "`answer` is missing"),
        ({"question": "What?", "answer": ""}, "missing_field", "`answer` is empty"),
        ({"question": "What?", "answer": True}, "missing_field", "`answer` must be a string, not true or false"),
        ({"question": "What?", "answer": "1", "id": 1.5}, "missing_field", "`id` must be"),
        ({"question": "What?", "answer": "1", "verifier": 3}, "missing_field", "`verifier` must be a string"),
        ({"question": "What?", "answer": "1", "image": "none.png"}, "missing_image", "none.png does not exist"),
        ({"question": "<image>?", "answer": "1"}, "placeholder_mismatch", "1 <image> for 0 images"),
        ({"question": "?", "answer": "1", "image": ["a.png", "b.png"]}, "placeholder_mismatch", "0 <image> for 2"),
        ({"question": "Again?", "answer": "1", "id": "good"}, "duplicate_id", "q.jsonl:1 already"),
    ],
)
def test_what_cannot_be_used_is_dropped_by_name(tmp_path, record, reason, words):
    file = write(tmp_path, {"id": "good", "question": "Good?", "answer": "yes"}, record)
    found = read_questions(file)
    assert [question.id for question in found.questions] == ["good"]
    (error,) = found.dropped
    assert (error.reason, error.origin) == (reason, f"{file}:2")
    assert words in error.detail
    assert found.counts() == {reason: 1}


def test_answers_that_are_not_needed(tmp_path):
    file = write(tmp_path, {"question": "Describe it."}, {"question": "What?", "answer": "red"})
    assert [q.answer for q in read_questions(file, need_answer=False).questions] == ["", "red"]


def test_one_split(tmp_path):
    write(
        tmp_path,
        {"id": 1, "question": "A?", "answer": "a", "split": "train"},
        {"id": 1, "question": "B?", "answer": "b", "split": "test"},
        {"id": 2, "question": "C?", "answer": "c"},
    )
    found = read_questions(tmp_path / "q.jsonl", split="test")
    assert [q.question for q in found.questions] == ["B?"]
    assert found.dropped == []  # another split's record with the same id is none of its business
    with pytest.raises(DataError, match=r"no record of split 'tset'; there are train \(1\), test \(1\), None \(1\)"):
        read_questions(tmp_path / "q.jsonl", split="tset")


def test_files_and_folders_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no such file of questions: .*none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")
    file = write(tmp_path, {"question": "A?", "answer": "a"})
    with pytest.raises(DataError, match=r"image_root .*nowhere is not a folder"):
        read_questions(file, tmp_path / "nowhere")
    file.write_text("\n\n")
    with pytest.raises(DataError, match="no record in it"):
        read_questions(file)


@pytest.mark.skipif(not EASY_VQA.is_dir(), reason="easy_vqa is not beside the checkout")
def test_easy_vqa_is_read_whole():
    lines = (EASY_VQA / "questions.jsonl").read_text().splitlines()
    unlike = {json.dumps([r["image"], r["question"], r["answer"]]) for r in map(json.loads, lines)}
    found = read_questions(EASY_VQA / "questions.jsonl")
    assert len(found.questions) == len({q.id for q in found.questions}) == len(unlike)
    assert found.counts() == ({"duplicate_id": len(lines) - len(unlike)} if len(lines) > len(unlike) else {})
    test = read_questions(EASY_VQA / "questions.jsonl", split="test")
    assert 0 < len(test.questions) < len(found.questions)
    assert {q.split for q in test.questions} == {"test"}


# ---- prompts ----


@pytest.mark.parametrize("style", ["direct", "cot", "boxed"])
def test_images_stay_in_front_of_the_prompt(style):
    text = prompt_text(Question("1", ("a.png",), "<image>\nWhich bar?", "3"), style)
    assert text.startswith("<image>\nWhich bar?\n")
    assert text.count("<image>") == 1


def test_what_the_styles_ask_for():
    question = Question("1", (), "Which bar?", "3")
    assert '"Final answer: .."' in prompt_text(question, "cot")
    assert r"\boxed{...}" in prompt_text(question, "boxed")
    assert "Final answer" not in prompt_text(question, "direct")


def test_a_template_of_ones_own():
    question = Question("1", ("a", "b"), "<image>\n<image>\nSame as <image>? {question}", "no")
    written = prompt_text(question, r"Solve: {question} Use \boxed{} and {braces}.")
    assert written == "<image>\n<image>\nSolve: Same as <image>? {question} Use \\boxed{} and {braces}."
    assert prompt_text(question, "{question}") == question.question


def test_a_style_that_is_none():
    with pytest.raises(RecipeError, match=r"build\.prompt: 'chain' is neither one of direct, cot, boxed nor"):
        prompt_text(Question("1", (), "?", "3"), "chain")
