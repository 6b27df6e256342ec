"""``vlmpo sample`` and ``vlmpo pair`` against servers and files that mean no good: one message, exit 2, no secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.chat_server import Reply, chat_server, says
from vlmpo.cli import app
from vlmpo.generate import server


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_FIRST_DELAY", 0.01)


def recipe(folder: Path, **build: Any) -> str:
    lines = [{"id": f"q{number}", "question": "what?", "answer": "red"} for number in range(3)]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    section = {"questions": "q.jsonl", "output_dir": str(folder / "out"), "samples": 2, "model": "m", "retries": 1}
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump({"model": {"path": "m"}, "build": {**section, **build}}))
    return str(file)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def written(folder: Path) -> str:
    """All that is in a folder, as one text."""
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (says(None), "of 3 questions none could be asked; the first: "),
        (says(["a"]), "/v1 is a list, not a text [bad_response]"),
        (says("x" * 1_000_001), "has 1000001 characters, at most 1000000 are read; "),
        (Reply(b"[" * 10**5), "does not answer in JSON (it is nested too deep)"),
        (Reply(b""), "does not answer in JSON (its answer is empty)"),
        (Reply(b"x" * (17 << 20)), "sends more than 16 MiB"),
        (
            Reply("", 302, {"Location": "http://elsewhere.example/"}),
            "redirects to http://elsewhere.example/; no redirect",
        ),
        (Reply(b"\x1b[31mno" + b"o" * 10**6, 403), r"status 403: \x1b[31mnoooo"),
        (Reply({"error": "no such model"}, 404), "check build.engine and build.model"),
    ],
)
def test_a_server_ends_a_run_with_one_message(tmp_path: Path, reply: Reply, words: str) -> None:
    with chat_server(lambda *_: reply) as there:
        result = call("sample", recipe(tmp_path, engine=there.url))
    assert (result.exit_code, words in result.output) == (2, True), result.output
    assert "Traceback" not in result.output
    assert "\x1b[31m" not in result.output


@pytest.mark.parametrize("place", ["recipe", "command line"])
@pytest.mark.parametrize("url", ["http://user:hunter2@h/v1", "https://hunter2@h", "http://h/v1?token=hunter2"])
def test_a_secret_in_the_url_goes_nowhere(tmp_path: Path, place: str, url: str) -> None:
    if place == "recipe":
        result = call("sample", recipe(tmp_path, engine=url))
    else:
        result = call("sample", recipe(tmp_path), f"build.engine={url}")
    assert result.exit_code == 2
    assert "build.engine: the URL holds a " in result.output
    assert "hunter2" not in result.output
    assert not (tmp_path / "out").exists()


def test_the_key_is_in_no_file_and_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMPO_API_KEY", "sk-hunter2")

    def answer(seen: Any, number: int) -> Reply:
        assert seen.headers["Authorization"] == "Bearer sk-hunter2"
        return says(f"{number}") if number < 2 else Reply(f"bad key {seen.headers['Authorization']}", 401)

    with chat_server(answer) as there:
        result = call("sample", recipe(tmp_path, engine=there.url, concurrency=1))
    assert (result.exit_code, "bad key Bearer ***" in result.output) == (2, True), result.output
    assert "hunter2" not in result.output + written(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"question_id": "q0", "sam\n', "Unterminated string"),
        (b'{"question_id": "q0", "sample_index": 0, "text": null}\n', "`text` is null"),
        (b"\x80\x81\x82\n", "codec can't decode"),
        (b"x" * (17 << 20) + b"\n", "more than 16 MiB"),
    ],
)
def test_damaged_responses_are_named_by_line(tmp_path: Path, line: bytes, words: str) -> None:
    with chat_server(lambda seen, _: says(f"{seen.payload['seed']}")) as there:
        file = recipe(tmp_path, engine=there.url)
        assert call("sample", file).exit_code == 0
        responses = tmp_path / "out" / "responses.jsonl"
        first, *rest = responses.read_bytes().splitlines(keepends=True)
        responses.write_bytes(first + line + b"".join(rest))
        for command in (["sample", file], ["pair", "correctness", file]):
            result = call(*command)
            assert result.exit_code == 2, result.output
            assert f"{responses}:2: not a response (" in result.output
            assert words in result.output
            assert result.output.count("error: ") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 10**5])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    with chat_server(lambda seen, _: says(f"{seen.payload['seed']}")) as there:
        file = recipe(tmp_path, engine=there.url)
        assert call("sample", file).exit_code == 0
        manifest = tmp_path / "out" / "sample_manifest.json"
        manifest.write_bytes(content)
        result = call("sample", file)
    assert (result.exit_code, f"{manifest} cannot be read (" in result.output) == (2, True), result.output
