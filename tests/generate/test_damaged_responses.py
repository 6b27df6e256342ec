"""Files of responses that are damaged: the line is named, in one message; a line that a kill cut off is mended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vlmpo.errors import DataError, RunError
from vlmpo.generate import responses
from vlmpo.generate.base import Generated
from vlmpo.generate.responses import open_responses, read_responses

GOOD: dict[str, Any] = {
    "question_id": "q",
    "sample_index": 0,
    "text": "red",
    "finish_reason": "stop",
    "model": "m",
    "settings": {},
}


def line(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode() + b"\n"


def faults(path: Path) -> list[str]:
    """What is said by either way to read the file."""
    said = []
    for read in (lambda: read_responses(path), lambda: open_responses(path, "m", {}).__enter__()):
        with pytest.raises(DataError) as caught:
            read()
        said.append(str(caught.value))
    return said


WITHOUT_TEXT = json.dumps({key: value for key, value in GOOD.items() if key != "text"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (line()[:50] + b"\n", "Unterminated string"),
        (line()[:-2] + b"\n", "Expecting ',' delimiter"),
        (b"\n", "Expecting value"),
        (b"\x00\xff\xfe\x80\n", "codec can't decode"),
        (bytes(range(128, 255)) + b"\n", "codec can't decode"),
        (b"[" * 100_000 + b"\n", "recursion"),
        (b"[]\n", "it holds a list"),
        (b"7\n", "it holds a number"),
        (b"null\n", "it holds null"),
        (WITHOUT_TEXT, "`text` is missing"),
        (line(text=None), "`text` is null"),
        (line(text=["red"]), "`text` is a list"),
        (line(question_id=5), "`question_id` is a number"),
        (line(sample_index="0"), "`sample_index` is a string"),
        (line(sample_index=True), "`sample_index` is true or false"),
        (line(sample_index=1.5), "`sample_index` is a number"),
        (line(sample_index=-1), "`sample_index` is not the number of a sample"),
        (line(sample_index=10**30), "`sample_index` is not the number of a sample"),
        (line(settings=[1]), "`settings` is a list"),
        (line(finish_reason={}), "`finish_reason` is an object"),
        (line(model=None), "`model` is null"),
        (line(more=1), "`more` is not a key of a response"),
        (line(text="\ud83d"), "`text` holds half of a surrogate pair"),
        (line(text="x" * 1_000_001), "`text` has 1000001 characters, at most 1000000"),
        (line()[:-2] + b', "text": "blue"}\n', "the key 'text' is given twice"),
        (line(sample_index=0).replace(b"0", b"9" * 5000), "Exceeds the limit (4300 digits)"),
    ],
)
def test_the_line_is_named(tmp_path: Path, bad: bytes, words: str) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_bytes(line() + bad + line(sample_index=1))
    for message in faults(path):
        assert message.startswith(f"{path}:2: not a response (")
        assert message.endswith("); remove the line")
        assert words in message
        assert len(message) < len(str(path)) + 250
    assert path.read_bytes() == line() + bad + line(sample_index=1)


@pytest.mark.parametrize("end", [b"", b"\n", b"\n{}\n"])
def test_a_line_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes) -> None:
    monkeypatch.setattr(responses, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "responses.jsonl"
    path.write_bytes(line() + b"x" * ((1 << 20) + 1) + end)
    for message in faults(path):
        assert message == f"{path}:2: not a response (more than 1 MiB); remove the line"


@pytest.mark.parametrize("cut", [b"{", b'{"question_id": "q", "sam', line(sample_index=1)[:-1], b"\xff"])
def test_a_last_line_that_a_kill_cut_off_is_removed(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_bytes(line() + cut)
    assert [one.sample_index for one in read_responses(path)] == [0]
    with open_responses(path, "m", {}) as file:
        assert (file.repaired, file.done) == (len(cut), {"q": {0}})
        assert path.read_bytes() == line()
        file.append("q", [Generated("red", "stop"), Generated("blue", "stop")])
    assert [one.text for one in read_responses(path)] == ["red", "blue"]


@pytest.mark.parametrize("between", [b"", line(sample_index=1), line(question_id="other")])
def test_a_response_twice_is_named(tmp_path: Path, between: bytes) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_bytes(line() + between + line(text="blue"))
    number = 2 + bool(between)
    with pytest.raises(RunError) as caught, open_responses(path, "m", {}):
        pass
    assert str(caught.value) == f"{path}:{number}: response 0 to question 'q' appears twice; remove one of the lines"


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe, device, folder = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    folder.mkdir()
    for path in (pipe, device, folder):
        for message in faults(path):
            assert message == f"{path} is not a regular file; name another folder in build.output_dir"
