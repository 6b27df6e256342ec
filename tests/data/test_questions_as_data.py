"""Questions with answers are data for fine-tuning; ``split`` takes the records of a file that say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from vlmpo.data.dataset import open_pairs
from vlmpo.data.formats import as_pairs
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.data.records import Message
from vlmpo.errors import DataError, RecordError

QUESTIONS = [
    '{"id": 7, "question": "How much?", "answer": 2.50, "verifier": "number", "split": "train"}',
    '{"id": 8, "question": "Pick.", "choices": ["red", "blue"], "answer": 1, "split": "test"}',
    '{"question": "Pick.", "options": {"A": "red", "B": "blue"}, "answer": ["blue", "red"], "split": "train"}',
    '{"question": "Why?", "answer": ""}',
    '{"question": "Why?", "answer": []}',
    "{broken",
]


def opened(path: Path, split: str | None = None, need_rejected: bool = False) -> Any:
    return open_pairs([SourceSpec(str(path), split=split)], need_rejected=need_rejected)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / "questions.jsonl").write_text("\n".join(QUESTIONS))
    return tmp_path / "questions.jsonl"


def test_an_answer_is_the_response(questions: Path) -> None:
    """A number as it is written, the first of several answers, the letter of a choice."""
    data = opened(questions)
    assert data.infos[0].format == "questions"
    read = [(data[index].prompt, data[index].chosen, data[index].rejected) for index in range(3)]
    lettered = (Message("user", "Pick.\nA. red\nB. blue"),)
    assert read == [((Message("user", "How much?"),), "2.50", None), (lettered, "B", None), (lettered, "B. blue", None)]
    assert data[0].metadata == {}
    for index, reason in ((3, "empty_response"), (4, "missing_field"), (5, "bad_json")):
        with pytest.raises(RecordError) as caught:
            data[index]
        assert caught.value.reason == reason


def test_pairs_cannot_be_made_of_questions(questions: Path) -> None:
    for open_them in (
        lambda: opened(questions, need_rejected=True),
        lambda: as_pairs([{"question": "a", "answer": 1}]),
    ):
        with pytest.raises(DataError, match=r"holds questions with their answers.*`vlmpo sample`.*nll: 1"):
            open_them()


def test_the_records_of_a_split(questions: Path) -> None:
    """A line that cannot be read is in every split: it is to be counted."""
    train = opened(questions, "train")
    assert (train.source_names, len(train), train.origin(1)) == (["questions/train"], 3, f"{questions}:3")
    with pytest.raises(DataError, match=r"split: no record is of 'dev'; there are train \(2\), test \(1\)"):
        opened(questions, "dev")
    plain = questions.with_name("plain.jsonl")
    plain.write_text(QUESTIONS[3])
    with pytest.raises(
        DataError, match="split: has no effect on a file of which no record says its `split`; leave out"
    ):
        opened(plain, "dev")


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet", "saved"])
def test_the_split_of_rows(tmp_path: Path, name: str) -> None:
    rows = [{"question": str(i), "chosen": "a", "rejected": "b", "split": ("train", "test")[i % 2]} for i in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    data = opened(tmp_path / name, "test", need_rejected=True)
    assert [data[index].prompt[0].text for index in range(len(data))] == ["1", "3"]
