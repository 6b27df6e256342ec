"""All checks that need a GPU, in one call of under eight minutes: ``python -m benchmarks.gpu_check --output DIR``.

Each part has a time limit and fails alone; DIR/gpu_check.json is rewritten after each:

- device: its name, and the versions of the libraries.
- alignment: the kernels that read a row in one call, compared to SDPA in float32 under an explicit mask, forward and
  backward, bf16 and fp16, trees of one to six responses; and their milliseconds at InternVL3-1B's shape.
- parity: a small InternVL and Qwen2.5-VL on the GPU against the models' own forward on the CPU: float32 log-probs and
  gradients to 1e-4; bf16 weights to 0.1 nats a token on average and 0.2 relative for gradients.
- start: step 0 in bf16, the reference online: the sigmoid term is ln 2 and every reward exactly 0.
- head: block sizes of the vocabulary head at 151k entries, eager and with torch.compile.
- 1B, 8B: seconds a step, peak memory and MFU of every arm (benchmarks/gpu_arms.py), with and without gradient
  checkpointing. 1B: float32 weights under bf16 autocast, AdamW. 8B: weights in bf16 and plain SGD, for timing only:
  weights, reference and gradients fit a card of 80 GB, with AdamW's states they would not. The model is made in
  memory, so a cached reference cannot be loaded again and stays; the cached arms' peaks include it.

MFU counts the least that a step needs: 3 times the forward of every unique token (backward is two forwards), over the
card's dense bf16 peak (989 TFLOP/s for an H100). The reference's forward, recomputation under checkpointing and
whatever an arm reads twice do not count, so the arms' MFUs compare as their speeds do. TRL scores one token more a
response, the line break that the chat template writes after the end of a turn.

On a machine without a network: first, ``benchmarks/gpu_wheels.sh`` fetches the wheels that are missing there into
``.wheels/``; there, ``python3 -m pip install -q --no-index --no-deps --target site .wheels/*.whl``, then
``PYTHONPATH=site:src python3 -m benchmarks.gpu_check --output DIR``. ``--miniature`` runs every part at tiny sizes on
any device, to test the script. Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import gpu_arms, head
from benchmarks.gpu_alignment import errors_of, readers, times_of
from benchmarks.gpu_model import INTERNVL3_1B, INTERNVL3_8B, MINIATURE, VlmSize, make_pairs
from benchmarks.gpu_parity import parity_of
from vlmpo import MPOConfig, MPOTrainer
from vlmpo.tree import chunked_logprobs as projection
from vlmpo.tree import varlen

ALL_SECONDS = 450.0


@dataclass
class Run:
    """The device, the size and the deadline of a part."""

    device: torch.device
    miniature: bool
    deadline: float

    def left(self) -> float:
        """Return the seconds until this part must end."""
        return self.deadline - time.perf_counter()


Figures = dict[str, Any]


def part_device(run: Run) -> Figures:
    """Return the device's name and the libraries' versions."""
    import importlib.metadata

    figures: Figures = {"python": platform.python_version(), "device": str(run.device)}
    for name in ("torch", "transformers", "accelerate", "peft", "trl", "flash-attn"):
        try:
            figures[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            figures[name] = None
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        figures |= {"name": properties.name, "gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        figures["capability"] = list(torch.cuda.get_device_capability(run.device))
    return figures


# ---- alignment ----


def part_alignment(run: Run) -> Figures:
    """Return the relative errors of every kernel that loads, and why the others do not load."""
    figures: Figures = {"passed": True, "bound": varlen._ROUNDING, "taken": None}
    for name, load in readers().items():
        try:
            reader = load()
            figures[name] = {"errors": errors_of(reader, run.device, run.miniature)}
        except Exception as fault:
            figures[name] = {"error": f"{type(fault).__name__}: {str(fault)[:300]}"}
            continue
        figures[name]["worst"] = max(figures[name]["errors"].values())
        figures["passed"] &= figures[name]["worst"] <= varlen._ROUNDING
        figures[name]["milliseconds"] = times_of(reader, run.device, run.miniature)
    if run.device.type == "cuda":
        chosen = varlen.kernel_for(run.device)
        figures["taken"] = None if chosen is None else getattr(chosen, "__qualname__", repr(chosen)).split(".")[0]
        figures["passed"] &= chosen is not None
    return figures


# ---- parity ----


def part_parity(run: Run) -> Figures:
    """Compare small models of two families, float32 and bf16, to their own forward."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    names = ("internvl-qwen2", "qwen2.5-vl")
    figures: Figures = {name: parity_of(name, run.device) for name in names}
    passed = []
    for name in names:
        full, half = figures[name]["float32"], figures[name]["bfloat16"]
        passed += [full["largest"] < 1e-4, full["gradient"] < 1e-4, half["mean"] < 0.1, half["gradient"] < 0.2]
    return {**figures, "passed": all(passed)}


# ---- start ----


def part_start(run: Run) -> Figures:
    """Check the first step's sigmoid term and rewards, with float32 weights under autocast and with bf16 weights."""
    figures: Figures = {"passed": True}
    for dtype in (torch.bfloat16, torch.float32):
        logs = first_logs(run, dtype)
        label = "autocast" if dtype == torch.float32 else "bf16 weights"
        figures[label] = {name: logs[name] for name in ("loss/sigmoid", "rewards/chosen", "rewards/rejected")}
        figures["passed"] &= abs(logs["loss/sigmoid"] - math.log(2)) < 1e-6
        figures["passed"] &= logs["rewards/chosen"] == logs["rewards/rejected"] == 0.0
    return figures


def first_logs(run: Run, dtype: torch.dtype) -> dict[str, float]:
    """Return the logs of one step of MPOTrainer on a small model."""
    size = MINIATURE if run.miniature else replace(MINIATURE, text_hidden=256, tiles=7, image_size=224)
    setting = gpu_arms.Setting(size, dtype, "adamw", 2, False, run.device)
    with tempfile.TemporaryDirectory() as folder:
        args = MPOConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=2,
            bf16=dtype == torch.float32,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            use_cpu=run.device.type != "cuda",
        )
        pairs = make_pairs(size, 2)
        trainer = MPOTrainer(model=setting.model(), args=args, train_dataset=pairs, processing_class=setting.processor)
        with contextlib.redirect_stdout(None):
            trainer.train()
    return next(logs for logs in trainer.state.log_history if "loss" in logs)


# ---- head ----


def part_head(run: Run) -> Figures:
    """Return seconds and memory by block size, eager and compiled."""
    sizes: tuple[head.Size, ...] = head.MINIATURE
    if not run.miniature:
        sizes = (head.Size(900, 151_674, 896), head.Size(900, 151_674, 3584))
    figures: Figures = {}
    for size in sizes:
        label = f"{size.scored} tokens, vocabulary {size.vocabulary}, hidden {size.hidden}"
        figures[label] = {"eager": head.seconds(size, run.device, 5)}
        if run.device.type == "cuda":
            memory = {name: head.extra_memory(size, name, run.device) for name in head.arms(run.device)}
            figures[label]["extra_mib"] = memory
        if run.left() < 15:
            figures[label]["compiled"] = {"error": "left out: no time was left"}
            continue
        with compiled_head():
            figures[label]["compiled"] = guarded(functools.partial(head.seconds, size, run.device, 5))
    return figures


@contextlib.contextmanager
def compiled_head() -> Iterator[None]:
    """Compile the passes over a block of logits."""
    with (
        mock.patch.object(projection, "_excess", torch.compile(projection._excess)),
        mock.patch.object(torch, "logsumexp", torch.compile(torch.logsumexp)),
    ):
        yield


def guarded(function: Callable[[], Any]) -> Any:
    """Return what ``function`` returns, or its error."""
    try:
        return function()
    except Exception as fault:
        return {"error": f"{type(fault).__name__}: {str(fault)[:300]}"}


# ---- throughput ----


def part_arms(run: Run, size: VlmSize, dtype: torch.dtype, optimizer: str, pairs: int) -> Figures:
    """Measure all arms without checkpointing, then with it as long as there is time."""
    figures: Figures = {}
    steps, seconds = (2, 60.0) if run.miniature else (5, 25.0)
    for checkpointing in (False, True):
        setting = gpu_arms.Setting(size, dtype, optimizer, pairs, checkpointing, run.device, steps, seconds)
        label = "gradient checkpointing" if checkpointing else "no gradient checkpointing"
        half = run.left() / (1 if checkpointing else 2)
        until = time.perf_counter() + half
        figures[label] = {}
        for name, arm in gpu_arms.table(setting, Run(run.device, run.miniature, until).left):
            figures[label][name] = arm
            print(f"  {size.name}, {label}: {name}: {line(arm)}", flush=True)
        ratios(figures[label])
    return figures


def line(arm: Figures) -> str:
    """Return one arm's figures in a line."""
    if "error" in arm:
        return str(arm["error"])
    words = f"{arm['seconds']:.3f} s a step, {arm['pairs_per_second']:.2f} pairs/s"
    if "peak_gib" in arm:
        words += f", peak {arm['peak_gib']:.1f} GiB, MFU {arm['mfu'] or math.nan:.1%}"
    return words


def ratios(arms: Figures) -> None:
    """Add each arm's speed as a multiple of TRL's."""
    peer = arms.get("TRL", {}).get("pairs_per_second")
    for arm in arms.values():
        if peer and "pairs_per_second" in arm:
            arm["to_trl"] = arm["pairs_per_second"] / peer


# ---- all of it ----


def parts(miniature: bool) -> dict[str, tuple[float, Callable[[Run], Figures]]]:
    """Return each part's most seconds and its function by name, the most informative first."""
    one, eight = (MINIATURE, MINIATURE) if miniature else (INTERNVL3_1B, INTERNVL3_8B)
    return {
        "device": (10, part_device),
        "alignment": (30, part_alignment),
        "parity": (40, part_parity),
        "start": (30, part_start),
        "8B": (150, lambda run: part_arms(run, eight, torch.bfloat16, "sgd", 1)),
        "1B": (130, lambda run: part_arms(run, one, torch.float32, "adamw", 2)),
        "head": (60, part_head),
    }


def check(output: Path, device: torch.device, miniature: bool, only: list[str] | None) -> bool:
    """Run the parts, or ``only`` some with the time of all; return whether all checks passed."""
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    record: Figures = {"miniature": miniature, "parts": {}}
    chosen = {name: part for name, part in parts(miniature).items() if not only or name in only}
    more = ALL_SECONDS / sum(seconds for seconds, _ in chosen.values())
    for name, (seconds, part) in chosen.items():
        begun = time.perf_counter()
        left = started + ALL_SECONDS - begun
        if left < 5:
            figures: Figures = {"error": "left out: no time was left"}
        else:
            try:
                figures = part(Run(device, miniature, begun + min(seconds * more, left)))
            except Exception:
                figures = {"error": traceback.format_exc()[-2000:], "passed": False}
        record["parts"][name] = {"seconds": time.perf_counter() - begun, **figures}
        state = figures.get("error") or {None: "done", True: "passed", False: "FAILED"}[figures.get("passed")]
        print(f"{name}: {state} ({time.perf_counter() - begun:.0f} s)", flush=True)
        record["passed"] = all(part.get("passed", True) for part in record["parts"].values())
        (output / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")
    return bool(record["passed"])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--parts", nargs="+", choices=list(parts(False)), default=None)
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.miniature:
        sys.exit("no CUDA device here; --miniature runs the parts at tiny sizes without one")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sys.exit(0 if check(options.output, device, options.miniature, options.parts) else 1)


if __name__ == "__main__":
    main()
