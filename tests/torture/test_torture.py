"""A short torture, and whether the harness sees what it is there to see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPO
from tests.torture import moments
from tests.torture.outcome import Outcome, differences, first_step
from tests.torture.report import groups, summary, table
from tests.torture.starts import Ended

CASES = ("kill-00", *(f"damage-{number:02d}" for number in (0, 8, 24)), "full-02")


@pytest.mark.slow
def test_kills_damages_and_a_full_disk(tmp_path: Path) -> None:
    """Three kills, three damages, one full disk; ``make torture`` does ten to twenty times as many."""
    report = tmp_path / "torture.json"
    command = [sys.executable, "-m", "tests.torture", "--only", ",".join(CASES), "--json", str(report)]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "scene")], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert {case["case"] for case in json.loads(report.read_text())["cases"]} == set(CASES)
    assert done.returncode == 0, done.stdout[-5000:]


def run_folder(folder: Path, *, weights: bytes = b"w", loss: float = 1.0, seconds: float = 2.0, used: int = 24) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "step_seconds": seconds}) + "\n")
    (folder / "manifest.json").write_text(json.dumps({"status": "finished", "data": {"sets": {"a": used}}}))
    return folder


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"seconds": 3.0}, []),
        ({"weights": b"v"}, ["model.safetensors has other weights"]),
        ({"loss": 1.0 + 1e-15}, ["metrics.jsonl differs at step 1 in loss"]),
        ({"used": 23}, ["the manifest counts {'a': 23}, not {'a': 24}"]),
    ],
)
def test_what_makes_two_runs_differ(tmp_path: Path, change: dict, expected: list[str]) -> None:
    assert differences(run_folder(tmp_path / "a", **change), run_folder(tmp_path / "b")) == expected


def test_a_missing_model_and_a_longer_log_are_differences(tmp_path: Path) -> None:
    one, other = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    with (one / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "train_loss": 2}\n')
    assert differences(one, other)[0] == "metrics.jsonl has 2 lines, not 1"
    (one / "model.safetensors").unlink()
    assert differences(one, other) == ["final weights: none, not model.safetensors"]


TRACEBACK = "Traceback (most recent call last):\n  File x\n    y\nValueError: no\n"


@pytest.mark.parametrize(
    ("ended", "faults"),
    [
        (Ended([0], "step 1  loss 2\n", False, 1.0), []),
        (Ended([2], "error: no\n", False, 1.0), []),
        (Ended([-9], "", True, 1.0), []),
        (Ended([1], TRACEBACK, False, 1.0), ["exit 1", "traceback: ValueError: no"]),
        (Ended([-9, 1], TRACEBACK, True, 1.0), ["exit 1", "traceback: ValueError: no"]),
        (Ended([2, -9], "error: the other rank is gone\n", True, 1.0), []),
        (Ended([2, -9], "", False, 1.0), ["exit -9"]),
        (Ended([0, -6], "", False, 1.0), ["exit -6"]),
        (Ended([-11], "", False, 1.0), ["exit -11"]),
        (Ended([2, 2], "error: a\rerror on rank 1: b\n", False, 1.0), ["2 messages instead of one"]),
        (Ended([1], TRACEBACK.replace("ValueError", "torch.distributed.elastic.x.ChildFailedError"), True, 1.0), []),
    ],
)
def test_how_a_start_may_end(ended: Ended, faults: list[str]) -> None:
    assert ended.faults() == faults


def test_the_step_it_went_on_from() -> None:
    assert first_step("warning\nstep 7/12  loss 1.0\nstep 8/12  loss 1.0\n") == 7
    assert first_step("step by step\neval  step 3/12  loss 1.0\n") is None


def test_moments(tmp_path: Path) -> None:
    written, gone = moments.writing(tmp_path, 2), moments.removing(tmp_path)
    lines = moments.lines_in(tmp_path / "metrics.jsonl", 2)
    assert not written() and not gone() and not lines()  # noqa: PT018  each takes its first look
    hidden = tmp_path / "_partial" / "checkpoint-3"
    hidden.mkdir(parents=True)
    (hidden / "a").touch()
    (tmp_path / "metrics.jsonl").write_text("{}\n{}\n")
    assert lines()
    assert not written()
    (hidden / "b").touch()
    assert written()
    assert not gone()
    hidden.rename(tmp_path / "checkpoint-3")
    assert not gone()  # it has another name, and all its files
    (tmp_path / "checkpoint-3" / "a").unlink()
    assert gone()


def test_the_report() -> None:
    outcomes = [
        Outcome("kill-00", "kill", kills=3, while_writing=1),
        Outcome("damage-00", "damage", result="refused"),
        Outcome("damage-01", "damage", result="BELIEVED", faults=["model.safetensors has other weights", "exit 1"]),
        Outcome("damage-02", "damage", result="exit 1", faults=["exit 1"]),
    ]
    assert summary(outcomes)[1]["results"] == {"refused": 1, "BELIEVED": 1, "exit 1": 1}
    assert "| kills of `vlmpo train` | 1 | 3 | 1 | 1 bit-equal | 0 |" in table(outcomes)
    assert groups(outcomes)["exit"] == ["damage-01", "damage-02"]
