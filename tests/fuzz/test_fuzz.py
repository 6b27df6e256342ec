"""A short fuzz of every reader, and whether the fuzz itself finds what it is there for."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import readers, worker
from tests.fuzz.mutate import Raw, dumps, file_content, mutated
from tests.fuzz.readers import READERS, Reader, make_input
from tests.fuzz.shrink import shrink
from tests.paths import REPO
from vlmpo.errors import DataError


@pytest.mark.slow
def test_no_reader_is_brought_down(tmp_path: Path) -> None:
    """300 inputs each; ``make fuzz`` reads 100,000."""
    report = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "tests.fuzz", "--count", "300", "--json", str(report)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    read = {name: found["inputs"] for name, found in json.loads(report.read_text())["readers"].items()}
    assert read == dict.fromkeys(READERS, 300)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("reader", READERS)
def test_an_input_is_drawn_by_its_number_alone(reader: str) -> None:
    drawn = [repr(make_input(reader, 0, index)) for index in range(40)]
    assert drawn == [repr(make_input(reader, 0, index)) for index in range(40)]
    assert len(set(drawn)) > 20
    assert drawn != [repr(make_input(reader, 1, index)) for index in range(40)]


@pytest.mark.parametrize("reader", ["format-mmpr", "format-swift", "meta", "responses", "state"])
def test_some_inputs_are_read_and_some_refused(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one would only test what the first check of a reader refuses."""
    monkeypatch.chdir(tmp_path)
    readers.prepare(tmp_path)
    found = [worker._once(reader, make_input(reader, 0, index)) for index in range(80)]
    assert sum(refused for _, _, refused in found) >= 3
    assert sum(not refused and fault is None for _, fault, refused in found) >= 3


def broken_reader(case: dict[str, int], folder: Path) -> None:
    if case["kind"] == 1:
        raise DataError("as it should be")
    if case["kind"] == 2:
        raise KeyError("not ours")
    if case["kind"] == 3:
        raise DataError("")
    if case["kind"] == 4:
        bytearray(1 << 62)
    while case["kind"] == 5:
        pass


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(0, None), (1, None), (2, "KeyError at "), (3, "DataError without a message"), (4, "MemoryError at ")],
)
def test_what_counts_as_a_fault(kind: int, fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, "broken", Reader(lambda rng: {}, broken_reader))
    _, found, refused = worker.attempt("broken", {"kind": kind})
    assert (found is None) if fault is None else found is not None and found[0].startswith(fault)
    assert refused == (kind in (1, 3))


def test_a_slow_input_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SLOW", 0.0)
    monkeypatch.setitem(READERS, "broken", Reader(lambda rng: {}, broken_reader))
    assert worker.attempt("broken", {"kind": 0})[1] == ("slow: over 0 s", "0.0 s")


def test_shrinking_keeps_what_matters() -> None:
    case = {"a": [1, 2, {"b": "xxxxxNxxxx"}], "c": "ddd", "e": (b"f", "g")}
    assert shrink(case, lambda smaller: "N" in repr(smaller)) == {"a": [{"b": "N"}]}


def test_raw_pieces_are_written_as_they_are() -> None:
    value = {"a": Raw("NaN"), "b": [Raw('{"c": 1, "c": 2}')], "d": "\ud83d"}
    assert dumps(value) == '{"a": NaN, "b": [{"c": 1, "c": 2}], "d": "\\ud83d"}'
    assert dumps(value, ascii_only=False).endswith('"\ud83d"}')


def test_mutations_leave_their_input_alone() -> None:
    value = {"a": [1, {"b": "c"}], "d": "e"}
    before = json.dumps(value)
    rng = random.Random(0)
    results = {repr(mutated(value, rng, ({"f": 1},))) for _ in range(200)}
    assert json.dumps(value) == before
    assert len(results) > 100
    assert len({file_content([value], rng, lambda records: dumps(records[0])) for _ in range(200)}) > 100
