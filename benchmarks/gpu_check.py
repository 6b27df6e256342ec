"""All checks that need a GPU, in one call of under eight minutes: ``python -m benchmarks.gpu_check --output DIR``.

Writes DIR/gpu.json and DIR/gpu.md, after every arm. Parts, the most important first; each has a time budget, fails
alone, and is left out if the time of all is up. ``--parts`` chooses some, which then have more time:

- device: its name, and the versions of the libraries.
- start: step 0, the reference online: the sigmoid term is ln 2 and every reward exactly 0.
- alignment: the kernels that read a row in one call, compared to SDPA in float32 under an explicit mask, forward and
  backward, bf16 and fp16, trees of one to six responses; and their milliseconds at InternVL3-1B's shape.
- parity: a small InternVL and Qwen2.5-VL on the GPU against the models' own forward on the CPU: float32 log-probs and
  gradients to 1e-4; bf16 weights to 0.1 nats a token on average and 0.2 relative for gradients.
- 8B, 1B: whole steps of 4 and 8 pairs, the reference online and cached, beside TRL's fastest setting, which is found by
  trying some for two steps each. 1B: float32 weights read in bf16, AdamW. 8B: weights in bf16 and plain SGD, for timing
  only: weights, reference and gradients fit a card of 80 GB, with AdamW's states they would not.
- peaks-8B: one pair a step, with and without recomputation: above all peak memory.
- determinism, kernels, precision, memory, attention: see benchmarks/gpu_determinism.py and so on.
- levers-1B, levers-8B: one setting of MPOConfig after the other beside the run as it is.
- families: Qwen2.5-VL-3B and Qwen3-VL-2B, 4 pairs a step.
- sizes-1B, sizes-8B: 1, 8 and 4 pairs a step, with and without recomputation.
- head: block sizes of the vocabulary head at 151k entries, eager and with torch.compile.

All of it takes two or three calls; ``python -m benchmarks.gpu_report`` puts them together.

TRL's settings (1.16): micro-batches without recomputation or a whole step with it, which is its default; Liger's
layers (``use_liger_kernel``, InternVL only); SDPA. For images it refuses ``precompute_ref_log_probs``, so that its
reference is always online, and it switches ``padding_free`` off by itself. ``bf16=True`` (autocast) is its default, and
slower than bf16 weights without it, so it is set with float32 weights only. It scores one token more a response, the
line break that the chat template writes after the end of a turn. All arms have as many readers and the same pairs,
whose images cost nothing to decode. The losses of the first steps must agree, to 0.5 % for that token's sake.

MFU counts the least that a step needs: 3 times the forward of every unique token (backward is two forwards), over the
card's dense bf16 peak (989 TFLOP/s for an H100). The reference's forward, recomputation and whatever an arm reads twice
do not count, so the arms' MFUs compare as their speeds do. A step's phases are marked by CUDA events
(benchmarks/gpu_phases.py). The stores of cached arms are filled before the first step, and the reference is dropped.

On a machine without a network: first, ``benchmarks/gpu_wheels.sh`` fetches the wheels that are missing there into
``.wheels/``; there, ``python3 -m pip install -q --no-index --no-deps --target site .wheels/*.whl``, then
``PYTHONPATH=site:src python3 -m benchmarks.gpu_check --output DIR``. ``--miniature`` runs every part at tiny sizes on
any device, to test the script. Exits with 1 if a number is wrong; speeds decide nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

# Read at the first matrix product; without it `deterministic` has no deterministic ones. The size is Hopper's default.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # of readers that are forked

import torch

from benchmarks import gpu_report
from benchmarks.gpu_run import Figures, Run

__all__ = ["PARTS", "Figures", "Run", "check"]

ALL_SECONDS = 440.0
# Most seconds of each part, and the function that it is, imported when its turn comes: by module and name.
PARTS = {
    "device": (10, "gpu_checks", "part_device"),
    "start": (20, "gpu_checks", "part_start"),
    "alignment": (20, "gpu_checks", "part_alignment"),
    "parity": (20, "gpu_checks", "part_parity"),
    "8B": (160, "gpu_speed", "part_8b"),
    "1B": (110, "gpu_speed", "part_1b"),
    "peaks-8B": (110, "gpu_speed", "part_peaks"),
    "determinism": (40, "gpu_determinism", "part_determinism"),
    "kernels": (40, "gpu_kernels", "part_kernels"),
    "precision": (60, "gpu_precision", "part_precision"),
    "memory": (60, "gpu_memory", "part_memory"),
    "attention": (40, "gpu_alignment", "part_attention"),
    "levers-1B": (100, "gpu_speed", "part_levers_1b"),
    "levers-8B": (120, "gpu_speed", "part_levers_8b"),
    "families": (100, "gpu_speed", "part_families"),
    "sizes-1B": (200, "gpu_speed", "part_sizes_1b"),
    "sizes-8B": (300, "gpu_speed", "part_sizes_8b"),
    "head": (60, "gpu_checks", "part_head"),
}


def load(module: str, name: str) -> Callable[[Run], Figures]:
    """Return the function of a part; one that is not there yet says so in its figures."""
    try:
        part: Callable[[Run], Figures] = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    except ModuleNotFoundError as fault:
        if fault.name != f"benchmarks.{module}":
            raise
        return lambda run: {"left_out": f"there is no benchmarks/{module}.py"}
    except AttributeError:
        return lambda run: {"left_out": f"benchmarks/{module}.py has no {name}"}
    return part


def run_part(name: str, run: Run) -> None:
    """Run a part; add to its figures what it returns, or its error."""
    begun = time.perf_counter()
    if run.left() < 5:
        run.figures["left_out"] = "no time was left"
    else:
        try:
            _, module, function = PARTS[name]
            run.figures.update(load(module, function)(run))
        except Exception:
            run.figures.update({"error": traceback.format_exc()[-2000:], "passed": False})
    run.figures.pop("unfinished", None)
    run.figures.setdefault("seconds", time.perf_counter() - begun)
    words = {None: "done", True: "passed", False: "FAILED"}[run.figures.get("passed")]
    state = run.figures.get("left_out") or run.figures.get("error") or words
    print(f"{name}: {state} ({time.perf_counter() - begun:.0f} s)", flush=True)


def check(
    output: Path, device: torch.device, miniature: bool, only: list[str] | None, all_seconds: float | None = None
) -> bool:
    """Run the parts, or ``only`` some with the time of all; return whether all checks passed.

    The device's name belongs to every run.
    """
    started, all_seconds = time.perf_counter(), ALL_SECONDS if all_seconds is None else all_seconds
    chosen = {name: part for name, part in PARTS.items() if not only or name in (*only, "device")}
    more = max(1.0, all_seconds / sum(seconds for seconds, *_ in chosen.values()))
    record: Figures = {"miniature": miniature, "parts": {}, "passed": True}

    def flush() -> None:
        record["passed"] = gpu_report.passed(record)
        gpu_report.write(record, output)

    for name, (seconds, *_) in chosen.items():
        begun = time.perf_counter()
        deadline = begun + min(seconds * more, started + all_seconds - begun)
        run = Run(device, miniature, deadline, record["parts"].setdefault(name, {"unfinished": True}), flush)
        flush()  # if the run is killed in this part, that is what stays of it
        run_part(name, run)
        flush()
    print(gpu_report.summary(record), flush=True)
    return bool(record["passed"])


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--parts", type=_names, default=None, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="for all parts (default: %(default)s)")
    options = parser.parse_args()
    unknown = [name for name in options.parts or () if name not in PARTS]
    if unknown:
        parser.error(f"--parts: there is no {', '.join(map(repr, unknown))}; there are {', '.join(PARTS)}")
    if not options.seconds > 0:
        parser.error(f"--seconds: {options.seconds:g} is no time")
    if not torch.cuda.is_available() and not options.miniature:
        sys.exit("no CUDA device here; --miniature runs the parts at tiny sizes without one")
    try:  # before minutes of a card are spent
        gpu_report.write({"miniature": options.miniature, "parts": {}, "passed": False}, options.output)
    except OSError as fault:
        parser.error(f"--output: {fault}")
    warnings.simplefilter("ignore")  # of libraries, once an arm
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sys.exit(0 if check(options.output, device, options.miniature, options.parts, options.seconds) else 1)


if __name__ == "__main__":
    main()
