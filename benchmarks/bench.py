"""Seconds a step and peak memory of vlmpo, TRL, plain code and the floor, side by side in one run.

    python -m benchmarks.bench [--shapes "7 tiles" ...] [--arms "TRL 1.16" ...] [--repeats 3]
                               [--precisions float32 bf16]

Every arm trains the same float32 weights on the same pairs, optimizer step and data loading included, in a process of
its own. All arms of a table compute in the same precision: float32, or bf16, by autocast, which is TRL's own default;
vlmpo in bf16 passes over float32 masters. The arms of a shape take turns, a few steps each, so that other work on the
machine slows all of them alike. Reported are the median of all steps with minimum and maximum, pairs a second as a
ratio to TRL's in the same run, and the process's peak memory. TRL leaves the reward shift out, so vlmpo runs without
it here, and the losses of the first steps must agree. Writes ``benchmarks/results/bench.json`` and ``bench.md``.

On a CUDA device the arms are those of ``benchmarks/gpu_check.py``, at the shapes of InternVL3-1B and 8B with random
weights; shapes and arms cannot be chosen there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.arms import ARMS, CACHED, GROUPS
from benchmarks.gpu_check import check
from benchmarks.shapes import SHAPES, VISONLYQA, Shape

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
PEER = "TRL 1.16"
SAME_STEPS = (PEER, "two padded rows", "vlmpo, online", "vlmpo, cached")  # the same pairs in the same steps
# Largest relative difference between the losses of their first steps, by precision; in bf16 they round differently.
AGREEMENT = {"float32": 1e-5, "bf16": 2e-3}
# A step of the padded arms takes up to half a minute at the largest shapes, so these run fewer arms.
FEW = (PEER, "vlmpo, online", "vlmpo, cached", "floor")
ONLY = {"7 tiles, vocabulary 151k": FEW, "7 tiles of 256 tokens": FEW}
WARM_UP = 1
LEGEND = (
    "Two padded rows: plain code that reads two rows a pair, with the logits of all tokens. Online: the reference is a "
    "model in memory; cached: its log-probs are in a store already. Grouped by 3, by 5: so many pairs share a prompt, "
    "and are a step. Floor: a bare forward and backward over the unique tokens, a pair at a time. In bf16 vlmpo makes "
    "bf16 passes over float32 weights, and the other arms run under autocast, as TRL does by default."
)


class Worker:
    """A process that takes a step for each line it is given, and writes its peak memory when no more lines come.

    Attributes:
        name: of the arm.
        steps: the record of each step; ``cpu_seconds`` are those that the process computed, on all cores.
    """

    def __init__(self, name: str, command: list[str], folder: str, root: Path = REPO) -> None:
        """Start Python with ``command`` on the source tree at ``root``; what goes wrong is logged in ``folder``."""
        self.name = name
        self.steps: list[dict[str, Any]] = []
        self._log = Path(folder) / "log.txt"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=root,
                env={**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"},
            )

    def step(self) -> None:
        """Take one step and keep its record."""
        assert self._process.stdin is not None
        started = self._cpu_seconds()
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        record = self._read()
        self.steps.append({**record, "cpu_seconds": self._cpu_seconds() - started})

    def end(self) -> float:
        """End the process and return its peak memory in MiB."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = self._read()["peak_mib"]
        self._process.wait()
        return float(peak)

    def wait(self) -> None:
        """Wait for a process that takes no steps, or raise SystemExit with the end of its log."""
        if self._process.wait():
            self._fail()

    def _cpu_seconds(self) -> float:
        return time.clock_gettime((~self._process.pid << 3) | 2)  # on Linux, the CPU clock of another process

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> NoReturn:
        raise SystemExit(f"arm {self.name!r} ended early:\n{self._log.read_text()[-3000:]}")


def start_arm(name: str, shape: Shape, folder: str, root: Path = REPO, precision: str = "float32") -> Worker:
    """Start an arm of the source tree at ``root`` and take its warm-up steps; a cached arm's store is filled first."""
    command = ["-m", "benchmarks.arms", name, shape.name, folder]
    half = [] if precision == "float32" else [precision]
    if name in CACHED:
        Worker(name, [*command, "fill", *half], folder, root).wait()
    arm = Worker(name, [*command, *half], folder, root)
    for _ in range(WARM_UP):
        arm.step()
    return arm


def arms_of(shape: Shape, names: list[str] | None) -> list[str]:
    """Return the arms that run at ``shape``, or those of ``names`` among them."""
    most = 3 if shape.real else 5 if shape.tiles else 1  # grouping pays with images; no real prompt has more pairs
    possible = [name for name in ONLY.get(shape.name, ARMS) if GROUPS.get(name, 1) <= most]
    return [name for name in possible if names is None or name in names]


def measure(shape: Shape, names: list[str], repeats: int, precision: str) -> dict[str, Any]:
    """Measure the arms at one shape in one precision, taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        arms = [start_arm(name, shape, folder, precision=precision) for name in names]
        for _ in range(repeats):
            for arm in arms:
                for _ in range(shape.steps):
                    arm.step()
        peaks = {arm.name: arm.end() for arm in arms}
    return {arm.name: summary(arm, peaks[arm.name]) for arm in arms}


def summary(arm: Worker, peak: float) -> dict[str, Any]:
    """Return the figures of an arm."""
    seconds = [step["seconds"] for step in arm.steps[WARM_UP:]]
    pairs = arm.steps[0]["pairs"]
    return {
        "seconds": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "pairs_per_second": pairs / statistics.median(seconds),
        "peak_mib": peak,
        "first_losses": [step["loss"] for step in arm.steps[:3]],
    }


def disagreement(figures: dict[str, Any]) -> float:
    """Return the largest relative difference between the first losses of arms that took the same pairs."""
    losses = [figures[name]["first_losses"] for name in SAME_STEPS if name in figures]
    return max((max(step) - min(step)) / abs(min(step)) for step in zip(*losses, strict=True)) if losses else 0.0


def table(shape: str, figures: dict[str, Any]) -> list[str]:
    """Return one shape as lines of Markdown."""
    peer = figures.get(PEER)
    lines = [f"### {shape}", "", "| arm | s a step (min - max) | pairs/s | to TRL | peak MiB | to TRL |"]
    lines.append("|---|---|---|---|---|---|")
    for name, arm in figures.items():
        speed = f"{arm['pairs_per_second'] / peer['pairs_per_second']:.2f}x" if peer else "-"
        memory = f"{arm['peak_mib'] / peer['peak_mib']:.2f}x" if peer else "-"
        spread = f"{arm['seconds']:.3f} ({arm['min']:.3f} - {arm['max']:.3f})"
        lines.append(
            f"| {name} | {spread} | {arm['pairs_per_second']:.2f} | {speed} | {arm['peak_mib']:.0f} | {memory} |"
        )
    steps = len(next(iter(figures.values()))["first_losses"])
    agreement = f"{disagreement(figures):.1e} (TRL, two padded rows, online, cached)"
    return [*lines, "", f"Losses of the first {steps} steps agree to {agreement}.", ""]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=None)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=None)
    parser.add_argument("--precisions", nargs="+", choices=list(AGREEMENT), default=list(AGREEMENT))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if torch.cuda.is_available():
        if options.shapes or options.arms:
            parser.error("--shapes and --arms are for the CPU; on CUDA see python -m benchmarks.gpu_check --help")
        sys.exit(0 if check(options.output, torch.device("cuda", 0), miniature=False, only=["1B", "8B"]) else 1)
    results: dict[str, dict[str, Any]] = {}
    for name in options.shapes or SHAPES:
        if SHAPES[name].real and not VISONLYQA.is_dir():
            print(f"{name}: skipped, {VISONLYQA.name} is not beside the checkout", flush=True)
            continue
        results[name] = {}
        for precision in options.precisions:
            figures = measure(SHAPES[name], arms_of(SHAPES[name], options.arms), options.repeats, precision)
            results[name][precision] = figures
            print("\n".join(table(f"{name}, {precision}", figures)), flush=True)
    write(options.output, results)
    apart = {
        f"{name}, {precision}": value
        for name, by_precision in results.items()
        for precision, figures in by_precision.items()
        if (value := disagreement(figures)) > AGREEMENT[precision]
    }
    if apart:
        raise SystemExit(f"losses of the arms are more than {AGREEMENT} apart: {apart}")


def write(output: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write ``bench.json`` and ``bench.md``; ``results`` are figures by shape and precision."""
    output.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    where = {"--output", str(output)}  # a folder of this machine says nothing to a reader
    arguments = [arg for arg in sys.argv[1:] if arg not in where]
    command = "python -m benchmarks.bench " + " ".join(f'"{arg}"' if " " in arg else arg for arg in arguments)
    record = {"command": command.strip(), "machine": machine, "shapes": results}
    (output / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    each = [(f"{name}, {kind}", figures) for name, by in results.items() for kind, figures in by.items()]
    lines = [line for name, figures in each for line in table(name, figures)]
    head = ["# Benchmark", "", f"`{record['command']}` on {machine['cores']} cores, {machine['threads']} threads.", ""]
    head += [LEGEND, ""]
    (output / "bench.md").write_text("\n".join([*head, *lines]))


if __name__ == "__main__":
    main()
