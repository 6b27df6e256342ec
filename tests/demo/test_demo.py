"""The demo's model as it answers: what it may never say, that a seed repeats it, that a saved copy answers alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.paths import REPO
from vlmpo.cli import app
from vlmpo.commands.demo import DemoRun, DemoSettings
from vlmpo.demo.answers import MAX_NEW_TOKENS, generate
from vlmpo.demo.model import DEMO_SIZE, demo_model, demo_processor
from vlmpo.demo.task import CELLS, LINES, SceneSource, render

MINIATURE = DemoSettings(
    batch=8,
    caption_steps=2,
    worked_steps=4,
    habit_steps=4,
    questions=8,
    held_out_questions=6,
    samples=4,
    steps=2,
    test_questions=10,
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_cell_looks_different():
    pictures = {render((cell,) * 9).tobytes() for cell in CELLS}
    assert len(pictures) == len(CELLS) == 10


def test_lines_cover_each_cell_once_a_direction():
    for direction in ("row", "column"):
        places = [place for name, line in LINES.items() if name.endswith(direction) for place in line]
        assert sorted(places) == list(range(9))


def test_no_image_is_in_two_splits(tmp_path: Path):
    run = DemoRun(tmp_path, 0, MINIATURE)
    later = run.source.questions(50) + run.source.answers(50, 0.5, 0.5) + run.source.captions(50)
    splits = [[item.scene for item in split] for split in (run.test, run.validation, later)]
    assert [len(split) for split in splits] == [10, 6, 150]
    images = [render(scene).tobytes() for split in splits for scene in split]
    assert len(set(images)) == 166


def test_shares_of_direct_answers():
    lessons = SceneSource(4).answers(2000, direct_sums=0.7, direct_differences=0.25)
    sums = [lesson.answer.startswith("Final") for lesson in lessons if " plus " in lesson.request]
    differences = [lesson.answer.startswith("Final") for lesson in lessons if " minus " in lesson.request]
    assert len(sums) + len(differences) == 2000
    assert sum(sums) / len(sums) == pytest.approx(0.7, abs=0.05)  # 4 standard errors at the least
    assert sum(differences) / len(differences) == pytest.approx(0.25, abs=0.07)


def test_the_longest_answer_fits():
    processor = demo_processor()
    source = SceneSource(6)
    answers = [q.worked for q in source.questions(200)] + [lesson.answer for lesson in source.captions(5)]
    assert max(len(processor.tokenizer(text)["input_ids"]) + 1 for text in answers) <= MAX_NEW_TOKENS


def test_one_image_token_a_cell():
    assert DEMO_SIZE.tokens_per_tile == 9
    assert demo_processor().image_seq_length == 9


def test_image_tokens_are_never_said(monkeypatch: pytest.MonkeyPatch):
    processor, questions = demo_processor(), SceneSource(3).questions(2)
    tokenizer, model = processor.tokenizer, demo_model(processor, 0)
    wanted = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    # A head that would say nothing but the image token.
    head = torch.nn.Linear(DEMO_SIZE.text_hidden, len(tokenizer))
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.zero_()[wanted] = 100.0
    model.set_output_embeddings(head)
    said: list[torch.Tensor] = []
    plain = model.generate

    def listening(**arguments):
        ids = plain(**arguments)
        said.append(ids[:, arguments["input_ids"].shape[1] :])
        return ids

    monkeypatch.setattr(model, "generate", listening)
    generate(model, processor, questions, samples=4, temperature=1.0)
    # After the end of a turn, generation pads.
    allowed = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert said[0].shape[0] == 8
    assert set(said[0].flatten().tolist()).isdisjoint(set(tokenizer.all_special_ids) - allowed)


@pytest.mark.slow
def test_a_seed_repeats_the_pairs_and_another_does_not(tmp_path: Path):
    run = DemoRun(tmp_path, 0, replace(MINIATURE, samples=8))
    run.teach("habit", run.source.answers(40 * 8, 1.0, 1.0), 40, 3e-3)  # until it answers at once
    torch.manual_seed(99)  # what was drawn before must not matter
    first = [(p.prompt, p.chosen, p.rejected) for p in run.pairs(run.validation, 5)]
    again = [(p.prompt, p.chosen, p.rejected) for p in run.pairs(run.validation, 5)]
    assert first
    assert first == again
    assert first != [(p.prompt, p.chosen, p.rejected) for p in run.pairs(run.validation, 6)]


@pytest.mark.slow
def test_what_is_saved_answers_alike_and_a_seed_repeats_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    settings = replace(MINIATURE, habit_steps=30, questions=12, samples=8)
    runs = [DemoRun(tmp_path / name, 7, settings) for name in ("runs/demo", "two")]
    results = [run.run() for run in runs]
    for result in results:
        del result["seconds"]
    assert json.dumps(results[0]) == json.dumps(results[1])
    assert results[0]["pairs"]["train"] > 0

    run, folder = runs[0], tmp_path / "runs/demo/model"
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in run.model.named_parameters())
    assert generate(model, processor, run.test) == generate(run.model, run.processor, run.test)

    # recipes/smoke.yaml as it ships, but for the steps, on what the demo has written
    monkeypatch.chdir(tmp_path)
    smoke = str(REPO / "recipes" / "smoke.yaml")
    for command, *changes in (["train", "training.max_steps=1", "training.warmup_steps=0"], ["evaluate"]):
        done = CliRunner().invoke(app, [command, smoke, *changes])
        assert done.exit_code == 0, done.output[-2000:]
    pairs = json.loads((tmp_path / "runs/smoke/manifest.json").read_text())["data"]["sets"]["pairs"]
    assert pairs["read"] == results[0]["pairs"]["train"]
    found = json.loads((tmp_path / "runs/smoke/evaluation/evaluation.json").read_text())
    assert found["questions"]["models"]["runs/demo/warm_up"]["accuracy"] == results[0]["arms"]["warm_up"]["accuracy"]
