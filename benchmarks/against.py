"""This source tree against another one: seconds a step, seconds of the loader, peak memory.

    python -m benchmarks.against --base PATH [--shapes "7 tiles" ...] [--arms "vlmpo, online" ...]
                                 [--cases "7 tiles of 448" ...] [--turns 9]

Each tree runs its own ``benchmarks.arms`` and ``benchmarks.loader``, from its own root, in processes of its own. The
processes of an arm take turns. Printed are medians with this tree's ratio to the base: wall-clock and processor time
of a step or of a pass of the loader, and the peak memory of the process. ``--shapes`` or ``--cases`` without a name
leaves that part out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.arms import ARMS
from benchmarks.bench import REPO, WARM_UP, Worker, start_arm
from benchmarks.loader import CASES, OURS
from benchmarks.shapes import SHAPES

PAIRS = 24  # of a pass of the loader
# Passes of one tree's loader, by the protocol of benchmarks.arms; the tree may be older than this file.
LOADER = """
import json, os, resource, sys, time
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import torch
from benchmarks.loader import CASES, arms, made_pairs, real_pairs
case, arm, count = CASES[sys.argv[1]], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
pairs = made_pairs(case, count) if case.tiles else real_pairs(count // case.together, case.together)
passes = arms(case, pairs)[arm]
for line in sys.stdin:
    started = time.perf_counter()
    for _ in passes():
        pass
    print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
print(json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)
"""


def compare(label: str, start: Callable[[str, Path], Worker], base: Path, turns: int) -> None:
    """Print the figures of one arm of both trees, each started by ``start(folder, root)``."""
    with tempfile.TemporaryDirectory() as base_folder, tempfile.TemporaryDirectory() as folder:
        workers = [start(base_folder, base), start(folder, REPO)]
        for turn in range(turns):
            for worker in workers[:: 1 if turn % 2 else -1]:  # neither tree is always the first
                worker.step()
        peaks = [worker.end() for worker in workers]
    cells = [f"{label:45}"]
    for name, key in (("wall", "seconds"), ("CPU", "cpu_seconds")):
        old, new = (statistics.median(step[key] for step in worker.steps[WARM_UP:]) for worker in workers)
        cells.append(f"{name} {old:7.3f} -> {new:7.3f} s: {new / old:5.3f}")
    cells.append(f"peak {peaks[0]:5.0f} -> {peaks[1]:5.0f} MiB: {peaks[1] / peaks[0]:5.3f}")
    print(" | ".join(cells), flush=True)


def start_loader(case: str, folder: str, root: Path) -> Worker:
    """Start the loader of the tree at ``root`` and take its warm-up pass."""
    worker = Worker(case, ["-c", LOADER, case, OURS, str(PAIRS)], folder, root)
    for _ in range(WARM_UP):
        worker.step()
    return worker


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="root of the other source tree")
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=["1 tile", "7 tiles", "text only"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["vlmpo, online", "vlmpo, cached"])
    parser.add_argument("--cases", nargs="*", choices=sorted(CASES), default=list(CASES), help="of the loader")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    base = options.base.resolve()
    for shape in options.shapes:
        for arm in options.arms:
            compare(f"{shape}: {arm}", partial(start_arm, arm, SHAPES[shape]), base, options.turns)
    for case in options.cases:
        compare(f"loader, {case}", partial(start_loader, case), base, options.turns)


if __name__ == "__main__":
    main()
