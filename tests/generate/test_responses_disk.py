"""A disk that is full while responses are written: whole questions stay, and one line names the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vlmpo import fileio
from vlmpo.errors import RunError
from vlmpo.fileio import writing
from vlmpo.generate.base import Generated
from vlmpo.generate.responses import open_responses, read_responses


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_whole_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path, write = tmp_path / "responses.jsonl", os.write

    def full(descriptor: int, content: bytes) -> int:
        if len(content) > 40:
            return write(descriptor, content[:40])
        raise OSError(number, os.strerror(number))

    def ask(question: str) -> None:
        with writing(tmp_path), open_responses(path, "m", {}) as file:
            file.append(question, [Generated("red", "stop"), Generated("blue", "stop")])

    ask("q1")
    with monkeypatch.context() as patch:
        patch.setattr(fileio.os, "write", full)
        with pytest.raises(RunError, match=os.strerror(number)) as error:
            ask("q2")
    assert str(error.value).startswith(f"{path}: ")
    assert [response.question_id for response in read_responses(path)] == ["q1", "q1"]
    assert path.read_bytes().endswith(b"\n")
    ask("q2")
    assert [response.text for response in read_responses(path)] == ["red", "blue", "red", "blue"]
