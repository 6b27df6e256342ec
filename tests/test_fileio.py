"""JSON that is written is JSON: NaN and infinity, which it lacks, become null and are named beside the metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlmpo.fileio import dump_json, replace_json, replace_json_lines
from vlmpo.train.callbacks import MetricsFile, metrics_line


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
