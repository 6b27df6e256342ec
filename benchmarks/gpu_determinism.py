"""Sums, first rewards and whole runs on a GPU: equal to the bit, and what ``deterministic`` costs.

``python -m benchmarks.gpu_determinism --output FILE`` (``--miniature``: tiny sizes, any device) writes JSON; it needs a
process of its own, as ``deterministic`` must be set before CUDA is used. :func:`part_determinism` starts that process.

The model is InternVL3-1B with four layers a tower, float32 weights under bf16 autocast, AdamW; two pairs a step of 7
tiles and responses of 300 words. Checked: a response sums to the same bits alone and in every row, on the device and on
the CPU; the first rewards are exactly 0 with the reference online; two runs with ``deterministic`` and one seed end at
equal weights. Figures alone: the first rewards with the reference cached, how many weights of two runs differ without
``deterministic``, and the seconds of a step's passes with and without.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.gpu_model import INTERNVL3_1B, MINIATURE, VlmSize, make_model, make_pairs, make_processor
from vlmpo import MPOConfig, MPOTrainer
from vlmpo.train.determinism import WORKSPACE
from vlmpo.tree.forward import sum_by_response
from vlmpo.tree.layout import PromptTree, build_row

CUT = replace(INTERNVL3_1B, name="InternVL3-1B, 4 layers", text_layers=4, vision_layers=4, response_words=(300, 300))
PAIRS_A_STEP = 2
WARM_UP = 2  # steps that are not timed

Figures = dict[str, Any]


class Run(Protocol):
    """What a part of gpu_check is given."""

    device: torch.device
    miniature: bool

    def left(self) -> float:
        """Return the seconds until the part must end."""


def part_determinism(run: Run) -> Figures:
    """Return what this module measures, from a process of its own, with ``passed`` among the figures."""
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # for the other process
    environment = {name: value for name, value in os.environ.items() if name != WORKSPACE}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.gpu_determinism", "--output", str(file)]
        command += ["--miniature"] if run.miniature else []
        done = subprocess.run(
            command,
            cwd=Path(__file__).resolve().parents[1],
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(run.left(), 5.0),
        )
        if done.returncode:
            return {"error": done.stderr[-2000:], "passed": False}
        figures: Figures = json.loads(file.read_text())
        return figures


# ---- in the process of its own ----


class Timed(MPOTrainer):
    """Keeps the seconds of each step's passes: the reference's, forward and backward."""

    seconds: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do as MPOTrainer does, between two synchronisations."""
        self._wait()
        started = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._wait()
        self.seconds.append(time.perf_counter() - started)
        return loss

    def _wait(self) -> None:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass
class Outcome:
    """Holds the final weights of a short run, all in one tensor, its first rewards, and seconds of its steps."""

    weights: Tensor
    first_rewards: dict[str, float]
    seconds: list[float]


def short_run(size: VlmSize, device: torch.device, steps: int, *, cached: bool = False, **settings: Any) -> Outcome:
    """Train a fresh model for some steps, always on the same pairs in the same order."""
    processor = make_processor(size)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        store = {"reference_kind": "cache", "reference_cache_dir": f"{folder}/store"} if cached else {}
        args = MPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=PAIRS_A_STEP,
            max_tokens_per_row=16_384,  # not what happens to be free: the rows of all runs must be the same
            learning_rate=1e-3,  # so that a different last bit of a gradient moves a weight elsewhere
            bf16=device.type == "cuda",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            use_cpu=device.type != "cuda",
            **store,
            **settings,
        )
        trainer = Timed(
            model=make_model(size, processor, torch.float32, device),
            args=args,
            train_dataset=make_pairs(size, 2 * PAIRS_A_STEP),
            processing_class=processor,
        )
        trainer.seconds = []
        if cached:
            trainer.precompute_reference()
        trainer.train()
    first = next(logs for logs in trainer.state.log_history if "loss" in logs)
    rewards = {name: first[f"rewards/{name}"] for name in ("chosen", "rejected")}
    rewards["log-prob"] = first["logps/chosen"]
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return Outcome(weights, rewards, trainer.seconds[WARM_UP:] or trainer.seconds)


def differing_sums(device: torch.device, repeats: int) -> int:
    """Return how many different sums a response of 450 tokens has: alone, in rows, again and again, and on the CPU."""
    generator = torch.Generator().manual_seed(0)
    logps = -13 * torch.rand(450, generator=generator)
    others = -13 * torch.rand(1000, generator=generator)
    found = set()
    for repeat in range(repeats):
        before, behind = repeat % 7, (37 * repeat) % 900
        trees = [_tree(length) for length in (before, 450, behind) if length]
        values = torch.cat([others[:before], logps, others[:behind]])
        for place in (device, torch.device("cpu")):
            sums = sum_by_response(values.to(place), [build_row(trees).to(place)])
            found.add(sums.tolist()[bool(before)])
    return len(found)


def _tree(length: int) -> PromptTree:
    return PromptTree(torch.zeros(3, dtype=torch.long), (torch.zeros(length, dtype=torch.long),))


def two_runs(size: VlmSize, device: torch.device, steps: int, *, deterministic: bool) -> Figures:
    """Make the same run twice; return what differs."""
    first, second = (short_run(size, device, steps, deterministic=deterministic) for _ in range(2))
    return {
        "first rewards": [first.first_rewards, second.first_rewards],
        "weights": first.weights.numel(),
        "weights that differ": int((first.weights != second.weights).sum()),
        "largest difference": float((first.weights - second.weights).abs().max()),
        "seconds": statistics.median([*first.seconds, *second.seconds]),
    }


def measure(device: torch.device, miniature: bool) -> Figures:
    """Return all figures of this module."""
    size, steps = (MINIATURE, 3) if miniature else (CUT, 8)
    # First the runs that set what must be set before CUDA is used.
    exact, plain = (two_runs(size, device, steps, deterministic=deterministic) for deterministic in (True, False))
    cached = short_run(size, device, 1, cached=True).first_rewards
    sums = differing_sums(device, 50) - 1
    online = [run[name] for runs in (exact, plain) for run in runs["first rewards"] for name in ("chosen", "rejected")]
    near = all(abs(cached[name]) < 1e-4 for name in ("chosen", "rejected"))
    return {
        "size": size.name,
        "deterministic": exact,
        "plain": plain,
        "cost of deterministic": exact["seconds"] / plain["seconds"],
        "cached first rewards": cached,
        "sums that differ": sums,
        "passed": not any(online) and near and sums == 0 and exact["weights that differ"] == 0,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, on any device")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.miniature:
        sys.exit("no CUDA device here; --miniature runs at tiny sizes without one")
    figures = measure(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"), options.miniature)
    options.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
