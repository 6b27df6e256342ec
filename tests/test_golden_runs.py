"""Tiny runs against the golden record: each step's losses and metrics, and the final weights, as they once were.

- ``GOLDEN_RECORD=1 pytest tests/test_golden_runs.py`` writes the record, and fails, so that it cannot pass for a test.
- ``GOLDEN_EXACT=1``: to 1e-12, on the machine and with the packages it was recorded with; else to 1e-6.

All settings are in tests.golden_runs. Everything is float64 but for the ``loss`` transformers adds up in float32: that
is held to 1e-6 always, its terms, which the log has unrounded, to the full.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.golden_runs import RUNS, do_run
from tests.paths import REPO

GOLDEN = Path(__file__).parent / "golden"
EXACT = os.environ.get("GOLDEN_EXACT") == "1"
RECORD = os.environ.get("GOLDEN_RECORD") == "1"
LOOSE = 1e-6
TOLERANCE = 1e-12 if EXACT else LOOSE
FLOAT32 = ("loss", "train_loss")
# What is nothing but rounding has no relative bound: rewards of zero, being differences of log-probs in the hundreds;
# tensors without a true gradient (the vision tower's key biases), which change by rounding alone.
METRIC_ROUNDING = 1e-13
WEIGHT_ROUNDING = 1e-14

ALONE = [name for name, run in RUNS.items() if "ranks" not in run]
TWO_RANKS = [name for name, run in RUNS.items() if "ranks" in run]

pytestmark = pytest.mark.slow


def in_two_ranks(folder: Path, runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Do runs in two gloo processes; returns what the first rank says, whose weights must be the second's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO / 'src'}{os.pathsep}{REPO}"}
    done = subprocess.run(
        [*command, "-m", "tests.golden_worker", str(folder), json.dumps(runs)],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in runs:
        first, second = (json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in (0, 1))
        assert first["weights"] == second["weights"]
        found[name] = first
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return in_two_ranks(tmp_path_factory.mktemp("two"), {name: {} for name in TWO_RANKS})


def differences(found: dict[str, Any], golden: dict[str, Any]) -> Iterator[str]:
    """What differs from the record, in words."""
    if len(found["log"]) != len(golden["log"]):
        yield f"{len(found['log'])} logged lines, not {len(golden['log'])}"
    for number, (mine, other) in enumerate(zip(found["log"], golden["log"], strict=False), start=1):
        yield from _in_line(f"line {number}", mine, other)
    if names := sorted(found["weights"].keys() ^ golden["weights"].keys()):
        yield f"tensors on one side only: {', '.join(names)}"
    for name in sorted(found["weights"].keys() & golden["weights"].keys()):
        mine, other = found["weights"][name], golden["weights"][name]
        for key, value in other.items():
            size = other[f"{key.partition('_')[0]}_norm"]  # a dot product may be small by chance; its scale is the norm
            if not abs(mine[key] - value) <= max(TOLERANCE * size, WEIGHT_ROUNDING):
                yield f"{name} {key}: {mine[key]!r}, not {value!r}"


def _in_line(where: str, mine: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    if keys := sorted(mine.keys() ^ other.keys()):
        yield f"{where}: metrics on one side only: {', '.join(keys)}"
    for key in sorted(mine.keys() & other.keys()):
        tolerance = LOOSE if key in FLOAT32 else TOLERANCE
        if not abs(mine[key] - other[key]) <= max(tolerance * abs(other[key]), METRIC_ROUNDING):
            yield f"{where} {key}: {mine[key]!r}, not {other[key]!r}"


def hold_against_record(name: str, found: dict[str, Any]) -> None:
    """Compare with the record, or make it."""
    file = GOLDEN / f"{name}.json"
    if RECORD:
        file.parent.mkdir(exist_ok=True)
        file.write_text(as_text(found))
        pytest.fail(f"recorded, not tested: {file.relative_to(REPO)}")
    assert file.is_file(), f"{file.relative_to(REPO)} is missing: a golden record is never made by itself"
    golden = json.loads(file.read_text())
    told = list(differences(found, golden))
    assert not told, f"{len(told)} differences from the record, to {TOLERANCE:g}:\n" + "\n".join(told[:20])


def as_text(found: dict[str, Any]) -> str:
    """JSON with one logged step, and one tensor, a line; floats as ``repr`` writes them."""
    log = ",\n".join(json.dumps(line) for line in found["log"])
    weights = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found["weights"].items())
    return f'{{"log": [\n{log}\n],\n"weights": {{\n{weights}\n}}}}\n'


@pytest.mark.parametrize("name", ALONE)
def test_one_process(tmp_path: Path, name: str) -> None:
    hold_against_record(name, do_run(name, tmp_path))


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(two_ranks: dict[str, dict[str, Any]], name: str) -> None:
    hold_against_record(name, two_ranks[name])


def test_the_record_notices(tmp_path: Path) -> None:
    """A beta that differs by a thousandth shows in the losses, in the rewards and in the weights."""
    if RECORD:
        pytest.skip("the record is being made")
    golden = json.loads((GOLDEN / "mpo.json").read_text())
    told = "\n".join(differences(do_run("mpo", tmp_path, beta=0.1001), golden))
    for part in ("loss/sigmoid", "rewards/margins", "lm_head.weight change_norm", "lm_head.weight final_dot"):
        assert part in told
