"""Writing whole files or none, what is said if the disk does not take them, and JSON that is JSON.

NaN and infinity, which JSON lacks, become null and are named beside the metrics.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlmpo import fileio
from vlmpo.errors import RecordError, RunError
from vlmpo.fileio import dump_json, replace_json, replace_json_lines, replace_text, writing
from vlmpo.train.callbacks import MetricsFile, metrics_line

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


def strictly(text: str) -> Any:
    """Parse JSON as any other language does."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_at_any_depth(tmp_path: Path, value: float) -> None:
    record = {"a": value, "b": [1.5, value, {"c": (value, "é", None, True)}], "d": 3}
    expected = {"a": None, "b": [1.5, None, {"c": [None, "é", None, True]}], "d": 3}
    assert strictly(dump_json(record)) == expected
    replace_json(tmp_path / "one.json", record)
    assert strictly((tmp_path / "one.json").read_text(encoding="utf-8")) == expected
    replace_json_lines(tmp_path / "lines.jsonl", [record, record])
    assert [strictly(line) for line in (tmp_path / "lines.jsonl").read_text(encoding="utf-8").splitlines()] == [
        expected,
        expected,
    ]


def test_finite_numbers_are_written_as_before() -> None:
    record = {"a": 0.1 + 0.2, "b": -0.0, "c": [1e-320, 2**70], "d": "ü"}
    assert dump_json(record) == json.dumps(record, ensure_ascii=False)
    assert dump_json(record, indent=1, ensure_ascii=True) == json.dumps(record, indent=1)


def test_a_log_names_what_was_not_finite(tmp_path: Path) -> None:
    logs = {"loss": math.nan, "grad_norm": math.inf, "rewards/margins": -math.inf, "learning_rate": 1e-6}
    line = strictly(metrics_line(7, logs))
    assert line == {
        "step": 7,
        **dict.fromkeys(("loss", "grad_norm", "rewards/margins")),
        "learning_rate": 1e-6,
        "not_finite": {"loss": "nan", "grad_norm": "inf", "rewards/margins": "-inf"},
    }
    assert metrics_line(7, {"loss": 0.5}) == '{"step": 7, "loss": 0.5}'
    file = MetricsFile(str(tmp_path))
    for step, values in ((1, logs), (2, {"loss": 0.5})):
        file.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=step), None, logs=values)
    assert [strictly(text)["step"] for text in file.file.read_text().splitlines()] == [1, 2]
