"""Two source trees compared: workers run in their own trees, take turns, and are reported as ratios of medians."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from benchmarks.bench import WARM_UP, Worker

from benchmarks import against

pytestmark = pytest.mark.slow  # they start processes

# Computes for 0.05 s a step in a tree called "new", twice as long in another; the peak is 100 and 200 MiB.
STEPS = """
import json, os, sys, time
cost = 1 if os.path.basename(os.getcwd()) == "new" else 2
for line in sys.stdin:
    until = time.process_time() + 0.05 * cost
    while time.process_time() < until:
        pass
    print(json.dumps({"seconds": 0.05 * cost, "path": os.environ["PYTHONPATH"]}), flush=True)
print(json.dumps({"peak_mib": 100 * cost}), flush=True)
"""


def start(folder: str, root: Path) -> Worker:
    worker = Worker("arm", ["-c", STEPS], folder, root)
    for _ in range(WARM_UP):
        worker.step()
    return worker


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    return tmp_path / "old", tmp_path / "new"


def test_a_worker_runs_in_its_own_tree_and_its_processor_time_is_measured(trees: tuple[Path, Path]) -> None:
    old, _ = trees
    worker = start(str(old), old)
    worker.step()
    assert worker.end() == 200
    assert worker.steps[-1]["path"].split(os.pathsep) == [str(old / "src"), str(old)]
    assert 0.1 <= worker.steps[-1]["cpu_seconds"] < 0.2


def test_trees_are_compared_by_medians(
    trees: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = trees
    monkeypatch.setattr(against, "REPO", new)
    against.compare("arm", start, old, turns=3)
    label, wall, cpu, peak = (cell.strip() for cell in capsys.readouterr().out.split("|"))
    assert label == "arm"
    assert wall == "wall   0.100 ->   0.050 s: 0.500"
    assert float(cpu.split()[-1]) == pytest.approx(0.5, abs=0.1)
    assert peak == "peak   200 ->   100 MiB: 0.500"


def test_a_worker_that_ends_early_shows_its_log(tmp_path: Path) -> None:
    worker = Worker("arm", ["-c", "raise ValueError('out of luck')"], str(tmp_path), tmp_path)
    with pytest.raises(SystemExit, match=r"(?s)arm 'arm' ended early.*out of luck"):
        worker.wait()
