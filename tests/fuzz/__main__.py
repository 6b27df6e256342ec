"""Fuzz every reader: ``python -m tests.fuzz [--count 100000] [--reader NAME ...] [--seed 0] [--show READER:INDEX]``.

Two workers read drawn inputs, valid ones with something broken and noise. A reader may refuse an input with one of our
own errors; any other exception, more than a second, more than 500 MB and a worker that dies are faults. Exit code 1 if
there is one. Each kind of fault is listed once, with a small example.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.figures import fill, machine
from tests.fuzz.readers import READERS, make_input
from tests.fuzz.worker import POSITION, shown
from tests.paths import REPO

WORKERS = 2
STUCK = 60.0  # seconds on one input, after which a worker is killed
STARTS = 300.0  # seconds it may take to start
_NAMES = list(READERS)


@dataclass
class Found:
    """All that is known of one reader."""

    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    faults: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@dataclass
class Results:
    """All that is known."""

    readers: dict[str, Found] = field(default_factory=lambda: defaultdict(Found))
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, told: dict[str, Any]) -> None:
        """Take in what a worker says."""
        if "fault" in told:
            key = f"{told['reader']}: {told['fault']}"
            known = self.examples.get(key)
            if known is None or len(told["example"]) < len(known["example"]):
                self.examples[key] = told
        elif "reader" in told:
            found = self.readers[told["reader"]]
            found.inputs += told["inputs"]
            found.refused += told["refused"]
            found.slowest = max(found.slowest, told["slowest"])
            for what, count in told["faults"].items():
                found.faults[what] += count


class Worker:
    """One worker process after another, each going on behind the input that killed the one before."""

    def __init__(self, share: int, options: argparse.Namespace, folder: Path) -> None:
        self.task = {
            "readers": options.reader,
            "seed": options.seed,
            "count": options.count,
            "share": share,
            "shares": WORKERS,
            "from": share,
            "folder": str(folder),
            "position": str(folder / f"position-{share}"),
        }
        self.output = folder / f"output-{share}"
        self.errors = folder / f"errors-{share}"
        self.output.touch()
        self._read = 0
        self._told: Counter[str] = Counter()
        self._start()

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO / 'src'}{os.pathsep}{REPO}"}
        environment |= {"VLMPO_CACHE": f"{self.task['folder']}/cache", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "tests.fuzz.worker", json.dumps(self.task)]
        Path(self.task["position"]).write_bytes(POSITION.pack(-1, -1))  # not yet anywhere
        with open(self.output, "ab") as output, open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=output, stderr=errors)
        self._moved = time.monotonic()
        self._before = self._position()

    def _position(self) -> tuple[int, int]:
        number, index = POSITION.unpack(Path(self.task["position"]).read_bytes())
        return number, index

    def look(self, results: Results) -> bool:
        """Take in what it has said; whether it is done. One that died or is stuck is replaced."""
        over = self.process.poll()
        with open(self.output, "rb") as output:
            output.seek(self._read)
            for line in output.read().split(b"\n")[:-1]:
                self._read += len(line) + 1
                told = json.loads(line)
                if "inputs" in told:
                    self._told[told["reader"]] += told["inputs"]
                results.add(told)
        now = self._position()
        if now != self._before:
            self._before, self._moved = now, time.monotonic()
        if over == 0:
            return True
        patience = STARTS if now[0] < 0 else STUCK
        if over is None and time.monotonic() - self._moved < patience:
            return False
        self._bury(results, f"the worker died ({over})" if over is not None else "the worker was stuck")
        return self.task["readers"] == []

    def _bury(self, results: Results, how: str) -> None:
        """Note the input that ended a worker, and start another one behind it."""
        self.process.kill()
        self.process.wait()
        number, index = self._position()
        if number < 0:
            raise SystemExit(f"a worker does not start:\n{self.errors.read_text()[-3000:]}")
        reader = _NAMES[number]
        example = shown(make_input(reader, self.task["seed"], index))
        last = (self.errors.read_text(errors="replace").strip().splitlines() or [""])[-1]
        results.add({"fault": how, "message": last, "reader": reader, "index": index, "example": example})
        untold = index // WORKERS + 1 - self._told[reader]  # what it read since it last told
        self._told[reader] += untold
        results.add({"reader": reader, "inputs": untold, "refused": 0, "slowest": 0.0, "faults": {how: 1}})
        left = [name for name in self.task["readers"] if _NAMES.index(name) > number]
        following = index + WORKERS
        if following < self.task["count"]:
            left = [reader, *left]
        else:
            following = self.task["share"]
        self.task |= {"readers": left, "from": following}
        if left:
            self._start()


def fuzz(options: argparse.Namespace) -> Results:
    """Run the workers to their end."""
    results = Results()
    with tempfile.TemporaryDirectory(prefix="vlmpo-fuzz-") as folder:
        workers = [Worker(share, options, Path(folder)) for share in range(WORKERS)]
        while workers:
            time.sleep(0.2)
            workers = [worker for worker in workers if not worker.look(results)]
    return results


def table(results: Results) -> str:
    """A row for each reader, in Markdown."""
    lines = ["| reader | inputs | refused | slowest (s) | faults | kinds of fault |", "|---|--:|--:|--:|--:|--:|"]
    for name in _NAMES:
        if name in results.readers:
            found = results.readers[name]
            numbers = [found.inputs, found.refused, f"{found.slowest:.2f}", sum(found.faults.values())]
            lines.append(f"| {name} | {' | '.join(map(str, numbers))} | {len(found.faults)} |")
    return "\n".join(lines)


def show_faults(results: Results, seed: int) -> None:
    """Print each kind of fault once."""
    for key, told in results.examples.items():
        count = results.readers[told["reader"]].faults[told["fault"]]
        print(f"\nFAULT {key} ({count} times)\n  {told['message']}\n  {told['example']}")
        print(f"  again: python -m tests.fuzz --seed {seed} --show {told['reader']}:{told['index']}")


def show(reader: str, index: int, seed: int) -> None:
    """Read one input, and let its exception through."""
    from tests.fuzz.readers import prepare

    case = make_input(reader, seed, index)
    print(f"{reader}:{index}: {shown(case)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare(Path(folder))
        READERS[reader].read(case, Path())


def main() -> int:
    """Fuzz what the options name."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Read broken input.")
    parser.add_argument("--count", type=int, default=100_000, help="inputs of each reader")
    parser.add_argument("--reader", nargs="+", choices=_NAMES, default=_NAMES, metavar="NAME", help=", ".join(_NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--figures", help="page whose block of figures is written anew")
    parser.add_argument("--show", metavar="READER:INDEX", help="read this one input, and let its exception through")
    options = parser.parse_args()
    if options.show:
        reader, index = options.show.split(":")
        show(reader, int(index), options.seed)
        return 0
    started = time.monotonic()
    print(f"seed {options.seed}, {options.count} inputs for each of {len(options.reader)} readers", flush=True)
    results = fuzz(options)
    show_faults(results, options.seed)
    seconds = time.monotonic() - started
    print(f"\n{table(results)}\n{seconds:.0f} s")
    if options.json:
        readers = {name: vars(found) for name, found in results.readers.items()}
        content = {"seed": options.seed, "seconds": round(seconds), "readers": readers, "faults": results.examples}
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    if options.figures:
        head = (
            f"Seed {options.seed}, {options.count:,} inputs for each reader, {seconds / 60:.0f} minutes; {machine()}."
        )
        fill(Path(options.figures), "figures of make fuzz", f"{head}\n\n{table(results)}")
    return int(bool(results.examples))


if __name__ == "__main__":
    sys.exit(main())
