"""The demo: what it draws and asks, how it marks and pairs, and a miniature of the whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vlmpo.commands.demo import ARMS, DemoSettings, demo, show
from vlmpo.demo.answers import make_pairs, marks, parse
from vlmpo.demo.model import demo_model, demo_processor, demo_tokenizer
from vlmpo.demo.task import CELL_PIXELS, LINES, Count, Question, SceneSource, render
from vlmpo.errors import RecipeError

SCENE = (
    *("red-circle", "empty", "red-square"),
    *("blue-triangle", "green-circle", "empty"),
    *("red-triangle", "blue-square", "blue-circle"),
)


def test_scene_is_drawn_as_it_says() -> None:
    image = render(SCENE)
    assert (image.size, image.mode) == ((48, 48), "RGB")
    middle = CELL_PIXELS // 2
    assert image.getpixel((CELL_PIXELS + middle, middle)) == (255, 255, 255)  # empty
    assert image.getpixel((2 * CELL_PIXELS + middle, middle)) == (220, 40, 40)  # red square, filled
    assert image.getpixel((middle, middle)) == (255, 255, 255)  # red circle, hollow
    assert image.getpixel((CELL_PIXELS + middle, 2 * CELL_PIXELS + middle)) == (50, 80, 220)  # blue square
    assert render((*SCENE[:8], "empty")).tobytes() != image.tobytes()


def test_answers_by_hand() -> None:
    # top row: red circle, nothing, red square; right column: red square, nothing, blue circle
    question = Question(SCENE, Count("red-shapes", "top-row"), Count("circles", "right-column"), add=True)
    assert question.truth == 3
    assert question.direct == "Final answer: 3 ."
    assert question.worked == (
        "red-shapes in top-row: red-circle 1 empty 1 red-square 2 . "
        "circles in right-column: red-square 0 empty 0 blue-circle 1 . 2 + 1 = 3 . Final answer: 3 ."
    )
    assert replace(question, add=False).truth == 1


def test_truths_recomputed_another_way() -> None:
    for question in SceneSource(5).questions(300):
        values = []
        for count in (question.left, question.right):
            cells = [question.scene[place] for place in LINES[count.line] if question.scene[place] != "empty"]
            wanted = count.kind.replace("-shapes", "").rstrip("s")
            values.append(len(cells) if wanted == "shape" else sum(wanted in cell for cell in cells))
        truth = values[0] + values[1] if question.add else values[0] - values[1]
        assert question.truth == truth >= 0
        assert parse(question.worked) == parse(question.direct) == truth


def test_no_scene_is_given_twice() -> None:
    source = SceneSource(0)
    scenes = [q.scene for q in source.questions(500)]
    scenes += [lesson.scene for lesson in [*source.captions(500), *source.answers(500, 0.5, 0.5)]]
    assert len(set(scenes)) == len(scenes) == 1500


def test_every_answer_comes_back_from_the_tokenizer() -> None:
    tokenizer = demo_tokenizer()
    source = SceneSource(1)
    texts = [q.worked for q in source.questions(50)] + [lesson.answer for lesson in source.captions(50)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("Final answer: 3 .", 3),
        ("anything . Final answer: 0 .", 0),
        ("Final answer: 3", None),
        ("Final answer: .", None),
        ("3", None),
        ("", None),
        ("Final answer: 3 . and more", None),
    ],
)
def test_parsing(response: str, number: int | None) -> None:
    assert parse(response) == number


def test_marks_by_hand() -> None:
    question = Question(SCENE, Count("red-shapes", "top-row"), Count("circles", "right-column"), add=True)
    found = marks([question] * 4, [question.worked, "Final answer: 3 .", "Final answer: 2 .", "so ."])
    assert (found["items"], found["accuracy"], found["unparsed"], found["worked"]) == (4, 0.5, 0.25, 0.25)
    assert found["accuracy_worked"] == 1.0
    assert found["accuracy_direct"] == pytest.approx(1 / 3)


def test_pairs_are_right_against_wrong() -> None:
    questions = SceneSource(2).questions(20)
    responses = [[q.worked, q.direct, q.direct, f"Final answer: {q.truth + 1} .", "so .", ""] for q in questions[:-2]]
    responses += [[questions[-2].direct] * 6, ["so ."] * 6]  # all right, all wrong: no pair
    pairs = make_pairs(questions, responses, most=2, seed=3)
    assert len(pairs) == 2 * 18
    truth = {q.text + render(q.scene).tobytes().hex(): q.truth for q in questions}
    for pair in pairs:
        key = pair.prompt[0].text.removeprefix("<image>\n") + pair.images[0].tobytes().hex()
        assert parse(pair.chosen) == truth[key]
        assert parse(pair.rejected) != truth[key]
        assert pair.rejected.strip()
    again = make_pairs(questions, responses, most=2, seed=3)
    assert [(p.chosen, p.rejected) for p in again] == [(p.chosen, p.rejected) for p in pairs]


@pytest.mark.slow
def test_a_miniature_of_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    settings = DemoSettings(
        batch=8,
        caption_steps=2,
        worked_steps=30,
        habit_steps=30,
        questions=12,
        held_out_questions=12,
        samples=4,
        steps=2,
        test_questions=8,
    )
    results = demo(tmp_path, seed=0, settings=settings)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["arms"].keys() == {"warm_up", *ARMS} == {"warm_up", "sft_on_chosen", "dpo", "mpo"}
    for arm in written["arms"].values():
        assert arm["items"] == 8
        assert {"accuracy", "low", "high", "unparsed", "worked", "chosen_logp"} <= arm.keys()
    assert written["arms"]["warm_up"]["reward_accuracy"] == 0.0  # its own reference: no reward above another
    assert written["pairs"]["train"] > 0
    assert results["seconds"]["total"] > 0
    for folder in ("warm_up", "model"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / folder)
        AutoProcessor.from_pretrained(tmp_path / folder)
    assert "held-out questions" in capsys.readouterr().out
    show(written)


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file"):
        demo(tmp_path / "file")


def test_the_model_is_as_small_as_it_says() -> None:
    parameters = sum(p.numel() for p in demo_model(demo_processor(), 0).parameters())
    assert 500_000 < parameters < 700_000
