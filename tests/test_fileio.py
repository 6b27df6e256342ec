"""Writing whole files or none, and what is said if the disk does not take them."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from vlmpo import fileio
from vlmpo.errors import RecordError, RunError
from vlmpo.fileio import replace_json, replace_text, writing

DISK = [
    (errno.ENOSPC, "No space left on device"),
    (errno.EROFS, "Read-only file system"),
    (errno.EDQUOT, "Disk quota exceeded"),
    (errno.EIO, "Input/output error"),
]


@pytest.mark.parametrize(("number", "words"), DISK)
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch, number: int, words: str, call: str) -> None:
    file = tmp_path / "manifest.json"
    replace_json(file, {"a": 1})

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fileio.os, call, fail)
        with pytest.raises(RunError, match=words) as error, writing(tmp_path):
            replace_json(file, {"a": 2})
    assert str(error.value).startswith(f"{file}: {words}; ")
    assert error.value.met_by == "rank"
    assert file.read_text() == '{\n "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError, match="File too large; a limit on the size of files"), writing(tmp_path):
            replace_text(tmp_path / "a", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (RuntimeError("I/O error: Disk quota exceeded (os error 122)"), "Disk quota exceeded"),
        (RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file"), "full"),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), "full"),
    ],
)
def test_writers_that_raise_errors_of_their_own(tmp_path: Path, error: Exception, words: str) -> None:
    with pytest.raises(RunError, match=words) as found, writing(tmp_path / "run"):
        raise error
    assert str(found.value).startswith(f"{tmp_path / 'run'}: ")


@pytest.mark.parametrize(
    "error",
    [ValueError("ours"), RuntimeError("shapes do not fit"), RecordError("bad", "a:1", "No space left"), KeyError(28)],
)
def test_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as found, writing(tmp_path):
        raise error
    assert found.value is error
