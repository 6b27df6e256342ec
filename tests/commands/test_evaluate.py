"""``vlmpo evaluate``: figures by hand, with an engine that says what it is told, and whole runs on files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.test_train import call, checkpoint, records, write_data, write_recipe  # noqa: F401  checkpoint is a fixture
from tests.tiny_models import model as tiny_model
from tests.training import flat_weights, logged
from vlmpo.data.records import Question
from vlmpo.errors import RecordError
from vlmpo.evaluate import answer_questions, compare, short_name, summarise
from vlmpo.generate.base import Generated


class Told:
    """An engine that gives the answers it is told, by question text; None: the question cannot be asked."""

    name = "told"
    batch_size = 4

    def __init__(self, answers: dict[str, str | None]) -> None:
        self.answers = answers
        self.notices: list[str] = []

    def generate(self, requests: Any) -> Any:
        for request in requests:
            assert request.n == 1
            told = next(v for k, v in self.answers.items() if k in request.messages[0].text)
            if told is None:
                yield RecordError("undecodable_image", request.origin, "broken")
            else:
                yield [Generated(told, "length" if told.endswith("...") else "stop")]


QUESTIONS = [
    Question("a", (), "apples?", "3", "number"),
    Question("b", (), "bears?", "yes", "exact"),
    Question("c", (), "cats?", "4", "number"),
    Question("d", (), "dogs?", "no", "exact"),
    Question("e", (), "eels?", "5", "number", origin="q.jsonl:5"),
]
TOLD = {
    "apples": "I count. Final answer: 3",
    "bears": "Final answer: no",
    "cats": "a very long story about many cats that never comes to an end and goes on and on and on ...",
    "dogs": "Final answer: no",
    "eels": None,
}


def test_figures_by_hand() -> None:
    answers, dropped = answer_questions(Told(TOLD), QUESTIONS, "cot")
    assert [answer.verdict.status for answer in answers] == ["correct", "wrong", "unparsed", "correct"]
    assert [(error.reason, error.origin) for error in dropped] == [("undecodable_image", "q.jsonl:5")]
    figures = summarise(answers, count_tokens=lambda text: len(text.split()))
    assert figures["items"] == 4
    assert figures["accuracy"] == 0.5
    assert figures["wrong"] == figures["unparsed"] == figures["cut"] == 0.25
    assert figures["low"] < 0.5 < figures["high"]
    assert figures["mean_tokens"] == (5 + 3 + 21 + 3) / 4
    assert figures["accuracy/exact"] == 0.5
    assert figures["items/number"] == 2
    assert summarise([], len) == {"items": 0}


def test_comparison_is_paired() -> None:
    mine, _ = answer_questions(Told(TOLD), QUESTIONS[:4], "cot")
    others = {**TOLD, "apples": "Final answer: 9", "bears": "Final answer: yes", "dogs": "Final answer: yes"}
    other, _ = answer_questions(Told(others), QUESTIONS[:4], "cot")
    found = compare(mine, other)
    assert (found["items"], found["only_mine"], found["only_other"]) == (4, 2, 1)
    assert found["difference"] == 0.25
    assert found["low"] <= 0.25 <= found["high"]
    assert compare(mine, mine)["difference"] == 0.0
    assert compare(mine[:1], mine[1:]) == {"items": 0}


def test_short_names_stay_apart() -> None:
    assert short_name("/data/runs/demo/model") == "demo/model"
    long = ["/x/" + "a" * 60 + "/" + end for end in ("one", "two")]
    assert len({short_name(path) for path in long}) == 2


def write_questions(folder: Path, count: int = 4) -> None:
    lines = [{"image": f"{i}.png", "question": f"what is picture {i}?", "answer": "red"} for i in range(count)]
    lines.append({"image": "absent.png", "question": "where?", "answer": "here"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_trained_model_on_pairs_and_questions(tmp_path: Path, checkpoint: Path, precision: str) -> None:  # noqa: F811
    write_data(tmp_path, records(16))
    write_questions(tmp_path)
    section = {"questions": "questions.jsonl", "image_root": "set/images", "max_new_tokens": 4}
    section["against"] = str(checkpoint)
    recipe = write_recipe(tmp_path, checkpoint, data={"hold_out": 0.25}, evaluate=section)
    trained = call("train", recipe, f"training.precision={precision}")
    assert trained.exit_code == 0, trained.output
    result = call("evaluate", recipe)  # left open, it takes the run's precision
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    # The same pairs against the same reference as at the end of training: the same figures.
    at_the_end = json.loads((tmp_path / "run" / "manifest.json").read_text())["evaluation"]["held_out"]
    for name in ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "loss/nll"):
        assert found["pairs"]["held_out"][f"held_out_{name}"] == pytest.approx(at_the_end[f"held_out_{name}"], abs=1e-5)
    questions = found["questions"]
    assert questions["dropped"] == {"missing_image": 1}
    assert set(questions["models"]) == {str(tmp_path / "run"), str(checkpoint)}
    assert all(figures["items"] == 4 for figures in questions["models"].values())
    assert questions["comparison"]["items"] == 4
    assert questions["overlap"]["with_seen_image"] == 3  # of four images, one was held out from training
    answers = [
        json.loads(line) for line in (tmp_path / "run" / "evaluation" / "answers.jsonl").read_text().splitlines()
    ]
    assert [answer["truth"] for answer in answers] == ["red"] * 4
    assert "paired bootstrap" in result.output


@pytest.mark.slow
def test_questions_are_asked_while_training_and_touch_nothing(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    weights = []
    for name in ("without", "with"):
        folder = tmp_path / name
        folder.mkdir()
        write_data(folder, records(8))
        write_questions(folder)
        changes: dict[str, Any] = {}
        if name == "with":
            changes["evaluate"] = {"questions": "questions.jsonl", "image_root": "set/images", "max_new_tokens": 4}
            changes["training"] = {"eval_strategy": "steps", "eval_steps": 2}
        result = call("train", write_recipe(folder, checkpoint, **changes))
        assert result.exit_code == 0, result.output
        trained = tiny_model()
        trained.load_state_dict(type(trained).from_pretrained(folder / "run").state_dict())
        weights.append(flat_weights(trained))
    assert torch.equal(*weights)
    lines = [json.loads(line) for line in (tmp_path / "with" / "run" / "metrics.jsonl").read_text().splitlines()]
    asked = [line for line in lines if "eval_answers/accuracy" in line]
    assert [line["step"] for line in asked] == [2, 4]
    assert all(line["eval_answers/items"] == 4 for line in asked)
    assert [a["loss"] for a in logged(tmp_path / "with" / "run")] == [
        b["loss"] for b in logged(tmp_path / "without" / "run")
    ]


def test_nothing_to_evaluate_on_is_said(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    write_data(tmp_path, records(2))
    result = call("evaluate", write_recipe(tmp_path, checkpoint))
    assert result.exit_code == 2
    assert "nothing to evaluate on" in result.output
