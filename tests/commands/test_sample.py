"""``vlmpo sample``: what it writes, and that a kill costs nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.chat_server import chat_server, says
from tests.paths import REPO
from tests.tiny_models import model, noise_image, processor
from vlmpo.cli import app
from vlmpo.commands.sample import MANIFEST_FILE, open_engine, sample
from vlmpo.data.records import Response
from vlmpo.errors import DataError, RecipeError, RunError
from vlmpo.generate import server
from vlmpo.generate.responses import RESPONSES_FILE, open_responses, read_responses
from vlmpo.generate.sample import SampleReport
from vlmpo.recipe_yaml import dump_recipe, load_recipe, parse_recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def write(folder: Path, checkpoint: Path, count: int = 10, **build: Any) -> Path:
    """A recipe, ``count`` questions (every fifth without an image) and their images."""
    (folder / "images").mkdir(exist_ok=True)
    records = []
    for number in range(count):
        noise_image(40 + 10 * (number % 7), 50, number).save(folder / "images" / f"{number}.png")
        image = {"image": f"{number}.png"} if number % 5 else {}
        records.append({"id": f"q{number}", **image, "question": f"what is picture {number}?", "answer": "red"})
    (folder / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    section = {"questions": "q.jsonl", "image_root": "images", "output_dir": str(folder / "out"), "samples": 3}
    recipe = {
        "model": {"path": str(checkpoint)},
        "data": {"max_tiles": 2},
        "build": {**section, "max_new_tokens": 8, "prompt": "direct", "batch_size": 4, **build},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "r.yaml"


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["sample", *map(str, arguments)])


def stored(folder: Path) -> list[Response]:
    return read_responses(folder / "out" / RESPONSES_FILE)


def as_set(responses: list[Response]) -> set[str]:
    """The records without their order; none may be there twice."""
    lines = {json.dumps(response.to_json(), sort_keys=True) for response in responses}
    assert len(lines) == len(responses)
    return lines


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / MANIFEST_FILE).read_text())


# ---- what it writes ----


def test_every_question_gets_its_samples(tmp_path, checkpoint):
    result = call(write(tmp_path, checkpoint))
    assert result.exit_code == 0, result.output
    assert "questions: 10 read, 10 used, 0 dropped" in result.stdout
    assert "responses: 0 were there, 30 written" in result.stdout
    responses = stored(tmp_path)
    assert [(r.question_id, r.sample_index) for r in responses] == [(f"q{q}", i) for q in range(10) for i in range(3)]
    settings = {**responses[0].settings}
    assert len(settings.pop("prompt_hash")) == 16
    assert settings == {
        "prompt": "direct",
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 8,
        "seed": 0,
        "max_tiles": 2,
        "dtype": "float32",
    }
    assert {r.model for r in responses} == {str(checkpoint)}
    written = manifest(tmp_path)
    assert (written["status"], written["read"], written["written"], written["identical"]) == ("finished", 10, 30, 0)
    reasons = [r.finish_reason for r in responses]
    assert written["finish_reasons"] == {reason: reasons.count(reason) for reason in set(reasons)}
    assert f"cut off at 8 tokens: {reasons.count('length')}" in result.stdout


def test_the_number_of_tiles_is_recorded_whoever_set_it(tmp_path, checkpoint):
    """Without the key it is the processor's own, so that responses sampled with the same number go on."""
    file = write(tmp_path, checkpoint)
    assert call(file, "data.max_tiles=null", "build.samples=1").exit_code == 0
    assert {response.settings["max_tiles"] for response in stored(tmp_path)} == {2}
    assert "10 were there, 10 written" in call(file, "build.samples=2").stdout
    refused = call(file, "data.max_tiles=3", "build.samples=3")
    assert refused.exit_code == 2
    assert "data.max_tiles" in refused.output


def test_the_texts_are_the_engines(tmp_path, checkpoint):
    """The seed reaches the engine, the prompt style the prompt, the records their question."""
    from vlmpo.data.readers.questions import read_questions
    from vlmpo.generate.prompts import request_for, seed_for

    recipe = load_recipe(write(tmp_path, checkpoint, count=4))
    sample(recipe)
    assert recipe.build is not None
    questions = read_questions(tmp_path / "q.jsonl", tmp_path / "images").questions
    engine = open_engine(recipe)
    for question in questions:
        request = request_for(question, "direct", n=3, seed=seed_for(0, question.id))
        assert request.messages[0].text.endswith("\nAnswer the question with a single word, number or phrase.")
        (answers,) = engine.generate([request])
        mine = [r for r in stored(tmp_path) if r.question_id == question.id]
        assert [r.text for r in mine] == [answer.text for answer in answers]


def test_bad_questions_are_counted_and_named(tmp_path, checkpoint):
    recipe = write(tmp_path, checkpoint)
    (tmp_path / "images" / "3.png").write_bytes(b"no picture")
    (tmp_path / "images" / "4.png").unlink()
    with (tmp_path / "q.jsonl").open("a") as file:
        file.write('{"question": "no end\n')
    result = call(recipe)
    assert result.exit_code == 0, result.output
    assert "questions: 11 read, 8 used, 3 dropped" in result.stdout
    for reason, line in {"undecodable_image": 4, "missing_image": 5, "bad_json": 11}.items():
        assert f"{tmp_path / 'q.jsonl'}:{line}: " in result.stdout
        assert f"dropped as {reason}: 1" in result.stdout
        assert manifest(tmp_path)["dropped"][reason] == 1
    assert {r.question_id for r in stored(tmp_path)} == {f"q{n}" for n in range(10)} - {"q3", "q4"}


def test_when_nothing_can_be_asked(tmp_path, checkpoint):
    recipe = write(tmp_path, checkpoint, count=30)
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(b"no picture")
    (tmp_path / "q.jsonl").write_text("".join((tmp_path / "q.jsonl").read_text().splitlines(True)[1:5]))
    result = call(recipe)
    assert result.exit_code == 2, result.output
    assert "of 4 questions none could be asked; the first: " in result.output
    with chat_server(lambda *_: says("yes")) as there:
        lines = [json.dumps({"image": "1.png", "question": f"{n}?"}) for n in range(30)]
        (tmp_path / "q.jsonl").write_text("\n".join(lines))
        result = call(recipe, f"build.engine={there.url}", "build.model=m", f"build.output_dir={tmp_path / 'new'}")
    assert result.exit_code == 2, result.output
    assert "20 requests failed and none succeeded; the last: " in result.output


def test_unusable_questions_are_named_and_unread_keys_too(tmp_path, checkpoint):
    recipe = write(tmp_path, checkpoint, count=2)
    faults = [
        {"question": "Which?", "choices": [1, 2], "answer": 1},
        {"question": "Which?", "choices": ["a", "b"], "answer": "c"},
        {"question": "Which?", "imgae": "1.png", "answer": "c"},
        {"question": "Which?", "image": "none.png", "answer": "c"},
    ]
    good = {"question": "Which?", "images": ["1.png"], "choices": ["a", "b"], "answer": 1, "hint": "c"}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*faults, good]))
    result = call(recipe)
    assert result.exit_code == 0, result.output
    assert "note: keys of the questions that are not read nor shown to the model: hint (1)" in result.output
    for number, reason in enumerate(
        ("ambiguous_answer", "answer_not_a_choice", "unread_media", "missing_image"), start=1
    ):
        assert f"dropped as {reason}: 1" in result.output
        assert f"q.jsonl:{number}: " in result.output
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in faults))
    result = call(recipe, f"build.output_dir={tmp_path / 'other'}")
    assert result.exit_code == 2, result.output
    message = result.output.split("of 4 questions none could be asked; the first: ")[1]
    assert [line.split(": ")[0].rpartition(":")[2] for line in message.splitlines()[:4]] == ["1", "2", "3", "4"]


def test_answers_are_not_needed(tmp_path, checkpoint):
    recipe = write(tmp_path, checkpoint)
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "1.png", "question": "Describe it."}))
    assert sample(load_recipe(recipe)).written == 3


# ---- going on ----


def test_nothing_is_asked_twice(tmp_path, checkpoint, monkeypatch):
    recipe = load_recipe(write(tmp_path, checkpoint))
    sample(recipe)
    before = (tmp_path / "out" / RESPONSES_FILE).read_bytes()
    monkeypatch.setattr("vlmpo.commands.sample.load_model", lambda *_: pytest.fail("nothing is missing"))
    report = sample(recipe)
    assert (report.before, report.written) == (30, 0)
    assert (tmp_path / "out" / RESPONSES_FILE).read_bytes() == before


def test_a_file_cut_off_anywhere_is_made_whole(tmp_path, checkpoint):
    recipe = load_recipe(write(tmp_path, checkpoint))
    sample(recipe)
    file = tmp_path / "out" / RESPONSES_FILE
    whole = file.read_bytes()
    expected = as_set(stored(tmp_path))
    end_of_line = whole.index(b"\n", len(whole) // 3) + 1
    cuts = [0, 1, end_of_line - 1, end_of_line, *random.Random(0).sample(range(len(whole)), 4)]
    for cut in cuts:
        file.write_bytes(whole[:cut])
        report = sample(recipe)
        assert as_set(stored(tmp_path)) == expected
        assert report.repaired == cut - (whole[:cut].rfind(b"\n") + 1)
        assert report.before + report.written == 30


def run_in_child(recipe: Path) -> None:
    sample(load_recipe(recipe))


@pytest.mark.slow
def test_killed_at_five_random_moments(tmp_path, checkpoint):
    """SIGKILL leaves what the same run, undisturbed, would have written; the kills hit a run under way."""
    (tmp_path / "calm").mkdir()
    expected_report = sample(load_recipe(write(tmp_path / "calm", checkpoint, 60, batch_size=3, max_new_tokens=16)))
    expected = as_set(stored(tmp_path / "calm"))
    assert expected_report.written == len(expected) == 180
    recipe = write(tmp_path, checkpoint, 60, batch_size=3, max_new_tokens=16)
    file = tmp_path / "out" / RESPONSES_FILE
    full = (tmp_path / "calm" / "out" / RESPONSES_FILE).stat().st_size
    dice = random.Random(3)
    left: list[int] = []
    fork = multiprocessing.get_context("fork")  # what takes seconds, torch and transformers, is imported already
    for moment in sorted(dice.uniform(0.0, 0.9) for _ in range(5)):
        child = fork.Process(target=run_in_child, args=(recipe,))
        child.start()
        while child.is_alive() and (file.stat().st_size if file.exists() else 0) < moment * full:
            time.sleep(0.001)
        time.sleep(dice.uniform(0.0, 0.02))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        left.append(file.stat().st_size if file.exists() else 0)
    assert left == sorted(left)
    assert len(set(left)) >= 4
    assert left[-1] < full
    report = sample(load_recipe(recipe))
    assert report.written > 0
    assert as_set(stored(tmp_path)) == expected


def test_more_samples_and_more_questions_are_added(tmp_path, checkpoint):
    sample(load_recipe(write(tmp_path, checkpoint, 6)))
    first = as_set(stored(tmp_path))
    report = sample(load_recipe(write(tmp_path, checkpoint, 8, samples=5)))
    assert (report.before, report.written) == (18, 22)
    more = stored(tmp_path)
    assert first < as_set(more)
    assert {(r.question_id, r.sample_index) for r in more} == {(f"q{q}", i) for q in range(8) for i in range(5)}
    report = sample(load_recipe(write(tmp_path, checkpoint, 8)))  # fewer samples: nothing to do, nothing lost
    assert (report.before, report.written) == (40, 0)


@pytest.mark.parametrize(
    ("override", "key", "then", "now"),
    [
        ("build.seed=1", "build.seed", "0", "1"),
        ("build.temperature=0.5", "build.temperature", "1.0", "0.5"),
        ("build.top_p=0.9", "build.top_p", "1.0", "0.9"),
        ("build.max_new_tokens=9", "build.max_new_tokens", "8", "9"),
        ("build.prompt=cot", "build.prompt", "'direct'", "'cot'"),
        ("data.max_tiles=1", "data.max_tiles", "2", "1"),
        ("model.dtype=bfloat16", "model.dtype", "'float32'", "'bfloat16'"),
    ],
)
def test_other_settings_need_another_folder(tmp_path, checkpoint, override, key, then, now):
    recipe = write(tmp_path, checkpoint, 2)
    assert call(recipe).exit_code == 0
    before = (tmp_path / "out" / RESPONSES_FILE).read_bytes()
    result = call(recipe, override)
    assert result.exit_code == 2, result.output
    assert f"{RESPONSES_FILE}:1 was sampled with {key} {then}, now it is {now}; " in result.output
    assert (tmp_path / "out" / RESPONSES_FILE).read_bytes() == before
    assert call(recipe, override, f"build.output_dir={tmp_path / 'other'}").exit_code == 0


def test_other_weights_under_the_same_path_are_noticed(tmp_path):
    (tmp_path / "model").mkdir()
    processor().save_pretrained(tmp_path / "model")
    model(0).save_pretrained(tmp_path / "model")
    recipe = load_recipe(write(tmp_path, tmp_path / "model", 2))
    sample(recipe)
    model(1).save_pretrained(tmp_path / "model")
    with pytest.raises(RunError, match=r"were sampled from other weights than .*build\.output_dir"):
        sample(recipe)


def test_a_question_that_changed_under_its_id_is_noticed(tmp_path, checkpoint):
    recipe = load_recipe(write(tmp_path, checkpoint, 3))
    sample(recipe)
    text = (tmp_path / "q.jsonl").read_text()
    (tmp_path / "q.jsonl").write_text(text.replace("what is picture 2?", "who is in picture 2?"))
    with pytest.raises(RunError, match=r"q\.jsonl:3: question 'q2' has changed since"):
        sample(recipe)
    (tmp_path / "q.jsonl").write_text(text.replace('"answer": "red"', '"answer": "blue"'))
    assert sample(recipe).written == 0  # the answer is not part of the prompt


def test_two_runs_cannot_write_at_once(tmp_path, checkpoint):
    recipe = load_recipe(write(tmp_path, checkpoint, 2))
    with (
        open_responses(tmp_path / "out" / RESPONSES_FILE, "m", {}),
        pytest.raises(RunError, match="another vlmpo sample is writing"),
    ):
        sample(recipe)
    assert sample(recipe).written == 6


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda lines: [lines[0], "{}\n", *lines[1:]], DataError, r"responses\.jsonl:2: not a response"),
        (lambda lines: [lines[0], "what?\n", *lines[1:]], DataError, r"responses\.jsonl:2: not a response"),
        (lambda lines: [*lines, lines[0]], RunError, r"responses\.jsonl:7: response 0 to question 'q0' appears twice"),
    ],
)
def test_a_file_that_was_tampered_with(tmp_path, checkpoint, change, error, words):
    recipe = load_recipe(write(tmp_path, checkpoint, 2))
    sample(recipe)
    file = tmp_path / "out" / RESPONSES_FILE
    file.write_text("".join(change(file.read_text().splitlines(True))))
    with pytest.raises(error, match=words):
        sample(recipe)


# ---- recipes ----


def test_a_recipe_that_only_builds_does_not_train(tmp_path, checkpoint):
    recipe = write(tmp_path, checkpoint)
    parsed = load_recipe(recipe)
    assert parse_recipe(dump_recipe(parsed)) == parsed
    result = CliRunner().invoke(app, ["train", str(recipe), f"training.output_dir={tmp_path / 'run'}"])
    assert result.exit_code == 2, result.output
    assert "data.train: names no data set to train on" in result.output


def test_a_recipe_that_only_trains_does_not_build():
    with pytest.raises(RecipeError, match=r"build: missing; give at least build\.questions"):
        sample(parse_recipe("model: {path: m}\ndata: {train: [a.jsonl]}"))


def test_the_folder_is_named_after_the_recipe(tmp_path):
    (tmp_path / "round2.yaml").write_text("model: {path: m}\nbuild: {questions: q.jsonl}")
    (tmp_path / "q.jsonl").write_text("")
    build = load_recipe(tmp_path / "round2.yaml").build
    assert build is not None
    assert build.output_dir == os.path.join("runs", "round2", "build")
    assert build.questions == str(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("engine: localhost", "build.engine: expected local or the http(s) URL of a chat server, got 'localhost'"),
        (
            "prompt: cott",
            "build.prompt: 'cott' is neither a style nor a template that contains {question}; did you mean",
        ),
        ("samples: 0", "build.samples: expected greater than or equal to 1, got 0"),
        ("sample: 3", "build.sample: unknown key; did you mean build.samples?"),
        ("top_p: 0", "build.top_p: expected greater than 0, got 0"),
        ("verifier: maths", "build.verifier: expected 'auto'"),
    ],
)
def test_mistakes_in_the_section(line, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"model: {{path: m}}\nbuild:\n  questions: q.jsonl\n  {line}\n")
    assert message in str(caught.value)


# ---- servers ----


def test_identical_answers_are_reported(tmp_path, checkpoint):
    recipe = write(tmp_path, checkpoint, 10)
    with chat_server(lambda seen, _: says(f"answer to {seen.payload['messages'][0]['content']!s:.40}")) as there:
        result = call(recipe, f"build.engine={there.url}", "build.model=m")
    assert result.exit_code == 0, result.output
    warning = "questions got 3 identical answers though build.temperature is 1: does the server ignore it"
    assert f"warning: 8 of 8 {warning}" in result.stderr  # at once: the rest need not be paid for
    assert f"warning: 10 of 10 {warning}" in result.stdout
    assert manifest(tmp_path)["identical"] == 10


def test_identical_answers_are_no_wonder_at_temperature_0(tmp_path, checkpoint):
    result = call(write(tmp_path, checkpoint, 10), "build.temperature=0")
    assert result.exit_code == 0
    assert "identical answers" not in result.output
    assert manifest(tmp_path)["identical"] == 10


def test_a_server_that_dies_leaves_whole_questions(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(server, "_FIRST_DELAY", 0.01)
    recipe = write(tmp_path, checkpoint, 10)

    def answer(seen: Any, number: int) -> Any:
        reply = says(f"{seen.payload['seed']}")
        reply.status = 200 if number < 17 else 503
        return reply

    with chat_server(answer) as there:
        result = call(recipe, f"build.engine={there.url}", "build.model=m", "build.retries=1", "build.concurrency=1")
    assert result.exit_code == 2, result.output
    assert "start again: what is done is kept" in result.output
    assert manifest(tmp_path)["status"] == "running"
    assert [r.question_id for r in stored(tmp_path)] == [f"q{q}" for q in range(5) for _ in range(3)]
    with chat_server(lambda seen, _: says(f"{seen.payload['seed']}")) as there:
        assert call(recipe, f"build.engine={there.url}/v1", "build.model=m").exit_code == 0
    assert len(there.seen) == 15
    assert len({r.text for r in stored(tmp_path)}) == 30
    assert len(as_set(stored(tmp_path))) == 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(port: int, log: Path) -> subprocess.Popen[bytes]:
    """``transformers serve`` on loopback; returns at once."""
    command = [sys.executable, str(REPO / "tests" / "serve_tiny.py"), "--port", str(port), "--device", "cpu"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        return subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=out, stderr=out, env=offline)


def wait_until(ready: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0) as response:
            return response.status == 200
    except OSError:
        return False


@contextmanager
def transformers_serve(tmp_path: Path) -> Iterator[tuple[int, list[subprocess.Popen[bytes]]]]:
    """The port, and the running process in a list, so that a test may put another in its place."""
    port, log = free_port(), tmp_path / "serve.log"
    running = [start_server(port, log)]
    try:
        wait_until(lambda: is_up(port), 120, "transformers serve")
        yield port, running
    except BaseException:
        print(log.read_text()[-4000:])
        raise
    finally:
        running[0].kill()
        running[0].wait()


def save_model(folder: Path, **generation: Any) -> Path:
    policy = model()
    policy.generation_config.update(**generation)
    policy.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_real_server(tmp_path):
    """transformers serve: the same greedy answers as the local engine; one that samples, killed and started again; one
    that ignores the temperature, found out."""
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi, uvicorn and openai")
    sampling = save_model(tmp_path / "sampling", do_sample=True, top_k=0)
    greedy = save_model(tmp_path / "greedy")

    def recipe(name: str, checkpoint: Path, port: int | None, **build: Any) -> Any:
        (tmp_path / name).mkdir()
        where = {} if port is None else {"engine": f"http://127.0.0.1:{port}", "model": str(checkpoint)}
        return load_recipe(write(tmp_path / name, checkpoint, **where, **build))

    with transformers_serve(tmp_path) as (port, running):
        for engine_port in (None, port):
            name = "local" if engine_port is None else "served"
            sample(recipe(name, sampling, engine_port, temperature=0.0, samples=1))
        texts = {name: {r.question_id: r.text for r in stored(tmp_path / name)} for name in ("local", "served")}
        assert texts["served"] == texts["local"]
        assert len(set(texts["local"].values())) > 5

        report = sample(recipe("same", greedy, port))
        assert (report.asked, report.identical) == (10, 10)

        reports: list[SampleReport] = []
        asked = recipe("killed", sampling, port, count=40, concurrency=4, retries=12)
        thread = threading.Thread(target=lambda: reports.append(sample(asked)))
        thread.start()
        file = tmp_path / "killed" / "out" / RESPONSES_FILE
        wait_until(lambda: file.exists() and len(file.read_bytes().splitlines()) >= 30, 60, "30 responses")
        running[0].kill()
        running[0].wait()
        done = len(file.read_bytes().splitlines())
        assert 30 <= done < 120
        running[0] = start_server(port, tmp_path / "serve.log")
        thread.join(180)
        assert not thread.is_alive()
    (report,) = reports
    assert report.written == 120
    responses = stored(tmp_path / "killed")
    assert sorted((r.question_id, r.sample_index) for r in responses) == sorted(
        (f"q{q}", i) for q in range(40) for i in range(3)
    )
    assert report.identical < 4
