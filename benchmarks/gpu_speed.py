"""The parts of the GPU check that measure whole steps: what is to be reached, TRL's fastest setting, levers, sizes."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import gpu_arms
from benchmarks.gpu_arms import Setting, cached_arm, floor_arm, trl_arm, vlmpo_arm
from benchmarks.gpu_measure import measure, measure_fitting
from benchmarks.gpu_model import INTERNVL3_1B, INTERNVL3_8B, MINIATURE
from benchmarks.gpu_qwen import MINIATURE_2_5, MINIATURE_3, QWEN2_5_VL_3B, QWEN3_VL_2B
from benchmarks.gpu_run import Figures, Run

LEAST = 8.0  # seconds without which no arm is begun
APART = 5e-3  # largest relative difference of first losses: TRL scores one token more a response
TRY = 2  # steps by which TRL's settings are compared

# Settings of MPOConfig beside which a run is measured as it is, and the weights' type that they need.
LEVERS: tuple[tuple[str, dict[str, Any], torch.dtype | None], ...] = (
    ("kernels off", {"kernels": "off"}, None),
    ("autocast", {"precision": "autocast", "bf16": True}, torch.float32),
    ("deterministic", {"deterministic": True}, None),
    ("vision kept", {"vision_memory": "keep"}, None),
    ("vision recomputed", {"vision_memory": "recompute"}, None),
    ("rows without a bound", {"max_tokens_per_row": None}, None),
    ("every second layer recomputed", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {
        "use_reentrant": False, "every_n_layers": 2}}, None),
    ("prompts read per response", {"attention": "separate"}, None),
    ("float32", {"precision": "float32", "bf16": False}, torch.float32),
    ("torch_compile", {"torch_compile": True}, None),
)  # fmt: skip


@dataclass
class Table:
    """Measures arms into the figures of a part, and writes them out after each.

    Attributes:
        run: of the part.
        setting: what the arms share.
    """

    run: Run
    setting: Setting

    def add(
        self, name: str, arm: gpu_arms.Arm, *, seconds: float = 30.0, fitting: bool = True, **changes: Any
    ) -> Figures:
        """Measure an arm under ``changes`` of the setting; return its figures.

        Args:
            name: of the row.
            arm: takes the steps.
            seconds: what it may take.
            fitting: whether to shorten the rows if memory runs out: vlmpo's arms.
            changes: fields of Setting.
        """
        setting = replace(self.setting, **changes)
        setting.seconds = min(seconds, self.run.left())
        if setting.seconds < (0.0 if self.run.miniature else LEAST):
            return self.leave_out(name, "no time was left", setting)
        return self.keep(name, (measure_fitting if fitting else measure)(arm, setting))

    def leave_out(self, name: str, reason: str, setting: Setting | None = None) -> Figures:
        """Note that an arm was not measured, and why."""
        given = setting or self.setting
        about = {"size": given.size.name, "pairs": given.pairs_a_step, "recomputation": given.checkpointing}
        return self.keep(name, {**about, "error": f"left out: {reason}"})

    def keep(self, name: str, figures: Figures) -> Figures:
        """Add the figures of an arm."""
        figures = {"arm": name, **figures}
        self.run.figures.setdefault("arms", []).append(figures)
        self.run.flush()
        print(f"  {line(figures)}", flush=True)
        return figures

    def fastest_trl(self, micro: int) -> None:
        """Try TRL's settings for two steps each, then measure the fastest in full.

        ``micro`` pairs a micro-batch without recomputation, or all pairs of a step with it; Liger's layers if it is
        there, and the better of the two once more without.
        """
        ways: list[dict[str, Any]] = [
            {"micro": micro, "checkpointing": False},
            {"micro": None, "checkpointing": True},
        ]
        tried: list[tuple[float, dict[str, Any]]] = []

        def attempt(ways: list[dict[str, Any]], liger: bool) -> None:
            for way in ways:
                found = self.trl(**way, liger=liger, seconds=18, steps=TRY, warm_up=1)
                if "error" not in found:
                    tried.append((found["seconds"], {**way, "liger": liger}))

        if has_liger(self.run):
            attempt(ways, liger=True)
            ways = [way for way in ways if not tried or way["micro"] == _best(tried)["micro"]]
        attempt(ways, liger=False)
        if tried:
            self.trl(**_best(tried), seconds=self.run.left(), warm_up=2)["fastest"] = True
            self.run.flush()

    def trl(self, micro: int | None, checkpointing: bool, liger: bool, **how: Any) -> Figures:
        """Measure TRL at one setting."""
        count = self.setting.pairs_a_step if micro is None else min(micro, self.setting.pairs_a_step)
        name = f"TRL, {count} a micro-batch" + (", Liger" if liger else "")
        if importlib.util.find_spec("trl") is None:
            return self.leave_out(name, "TRL is not installed")
        arm = functools.partial(trl_arm, micro=count, liger=liger)
        return self.add(name, arm, checkpointing=checkpointing, fitting=False, **how)


def _best(tried: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    return min(tried, key=lambda each: each[0])[1]


def has_liger(run: Run) -> bool:
    """Return whether Liger's kernels can run."""
    return run.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def agreement(run: Run) -> Figures:
    """Return the part's outcome: whether the losses of the first steps of vlmpo's and TRL's arms agree.

    Of a part that has no two arms to compare, nothing is said.
    """
    losses: dict[Any, list[float]] = {}
    for arm in run.figures.get("arms", ()):
        if "error" not in arm and arm["arm"] != "floor" and "grouped" not in arm["arm"]:
            losses.setdefault((arm["size"], arm["pairs"]), []).append(arm["first_logs"]["loss"])
    compared = [each for each in losses.values() if len(each) > 1]
    if not compared:
        return {}
    finite = all(map(math.isfinite, itertools.chain.from_iterable(compared)))  # max and min pass over NaN
    apart = max(max(each) / min(each) - 1 for each in compared) if finite else math.inf
    return {"losses_apart": apart, "passed": apart < APART}


def line(arm: Figures) -> str:
    """Return one arm's figures in a line."""
    about = f"{arm['size']}, {arm['pairs']} pairs{', recomputation' if arm['recomputation'] else ''}: {arm['arm']}"
    if "error" in arm:
        return f"{about}: {arm['error'][:100]}"
    words = f"{about}: {arm['seconds']:.3f} s"
    if "peak_gib" in arm:
        words += f", MFU {arm.get('mfu', 0.0):.1%}, {arm['peak_gib']:.1f} GiB"
    return f"{words} ({arm['steps']} steps; all {arm['all_seconds']:.0f} s)"


def setting_of(run: Run, size: str, pairs: int) -> Setting:
    """Return the setting of InternVL3-1B (float32 weights, AdamW) or 8B (bf16 weights, plain SGD)."""
    shape: Any = {"1B": INTERNVL3_1B, "8B": INTERNVL3_8B}[size]
    dtype, optimizer = (torch.float32, "adamw") if size == "1B" else (torch.bfloat16, "sgd")
    shape, pairs, steps = (MINIATURE, min(pairs, 2), 1) if run.miniature else (shape, pairs, 10)
    return Setting(shape, dtype, optimizer, pairs, False, run.device, steps)


# ---- parts ----


def part_goal(run: Run, size: str, pairs: int, micro: int) -> Figures:
    """Measure vlmpo online and cached beside TRL's fastest setting; ``micro`` pairs are what it reads at once."""
    table = Table(run, setting_of(run, size, pairs))
    table.add("vlmpo, online", vlmpo_arm, seconds=35)
    table.add("vlmpo, cached", cached_arm, seconds=35)
    table.fastest_trl(micro)
    table.add("floor", floor_arm, seconds=15, fitting=False)
    table.add("vlmpo, grouped by 3, cached", functools.partial(cached_arm, by=3))
    return agreement(run)


def part_peaks(run: Run) -> Figures:
    """Measure memory and speed at 8B, one pair a step, with and without recomputation."""
    table = Table(run, setting_of(run, "8B", 1))
    trl = functools.partial(table.trl, micro=1, seconds=20)
    table.add("vlmpo, cached", cached_arm, seconds=20)
    table.add("vlmpo, online", vlmpo_arm, seconds=20)
    trl(checkpointing=False, liger=False)
    table.add("vlmpo, cached", cached_arm, seconds=20, checkpointing=True)
    table.add("floor", floor_arm, seconds=15, fitting=False, checkpointing=True)
    if has_liger(run):
        trl(checkpointing=False, liger=True)
    table.add("vlmpo, online", vlmpo_arm, seconds=20, checkpointing=True)
    trl(checkpointing=True, liger=False)
    table.add("floor", floor_arm, seconds=15, fitting=False)
    return agreement(run)


def part_levers(run: Run, size: str, pairs: int) -> Figures:
    """Measure one setting after the other beside the run as it is, the reference online."""
    table = Table(run, setting_of(run, size, pairs))
    changes = {"seconds": 20, "steps": table.setting.steps if run.miniature else 6}
    table.add("vlmpo, online", vlmpo_arm, **changes)
    for name, fields, dtype in LEVERS:
        label = f"vlmpo, online, {name}"
        missing = [each for each in fields if each not in gpu_arms.config_fields()]
        if missing:
            table.leave_out(label, f"MPOConfig has no field {missing[0]}")
        elif dtype not in (None, table.setting.dtype):
            table.leave_out(label, "the weights are in bf16")
        elif run.miniature and "torch_compile" in fields:
            table.leave_out(label, "compiling takes too long in miniature")
        else:
            given = {**fields, "bf16": fields.get("bf16", table.setting.autocast)}
            table.add(label, functools.partial(vlmpo_arm, **given), fitting=False, **changes)
    for rows in (2, 1):
        table.add(f"vlmpo, online, rows of {rows}", vlmpo_arm, fitting=False, rows=rows, **changes)
    if table.setting.dtype == torch.float32:
        table.add("vlmpo, online, bf16 weights and states", vlmpo_arm, dtype=torch.bfloat16, **changes)
    return agreement(run)


def part_families(run: Run) -> Figures:
    """Measure Qwen2.5-VL-3B and Qwen3-VL-2B, bf16 weights and SGD, beside TRL's fastest setting."""
    sizes: tuple[Any, ...] = (MINIATURE_2_5, MINIATURE_3) if run.miniature else (QWEN2_5_VL_3B, QWEN3_VL_2B)
    for size in sizes:
        base = setting_of(run, "8B", 4)
        table = Table(run, Setting(size, torch.bfloat16, "sgd", base.pairs_a_step, False, run.device, base.steps))
        table.add("vlmpo, online", vlmpo_arm, seconds=20)
        table.add("vlmpo, cached", cached_arm, seconds=20)
        table.trl(micro=2, checkpointing=False, liger=False, seconds=20)
        table.trl(micro=None, checkpointing=True, liger=False, seconds=15)
    return agreement(run)


def part_sizes(run: Run, size: str, micro: int) -> Figures:
    """Measure 1, 8 and 4 pairs a step, with and without recomputation."""
    for pairs in (1, 8, 4):
        for checkpointing in (False, True):
            table = Table(run, replace(setting_of(run, size, pairs), checkpointing=checkpointing))
            changes: dict[str, Any] = {"seconds": 18}
            table.add("vlmpo, online", vlmpo_arm, **changes)
            table.add("vlmpo, cached", cached_arm, **changes)
            table.trl(micro=None if checkpointing else micro, checkpointing=checkpointing, liger=False, **changes)
            table.add("floor", floor_arm, fitting=False, **changes)
        if run.miniature:
            break
    return agreement(run)


part_8b: Callable[[Run], Figures] = functools.partial(part_goal, size="8B", pairs=4, micro=1)
part_1b: Callable[[Run], Figures] = functools.partial(part_goal, size="1B", pairs=8, micro=2)
part_levers_1b: Callable[[Run], Figures] = functools.partial(part_levers, size="1B", pairs=8)
part_levers_8b: Callable[[Run], Figures] = functools.partial(part_levers, size="8B", pairs=4)
part_sizes_1b: Callable[[Run], Figures] = functools.partial(part_sizes, size="1B", micro=2)
part_sizes_8b: Callable[[Run], Figures] = functools.partial(part_sizes, size="8B", micro=1)
