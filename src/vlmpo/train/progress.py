"""What a run tells while it runs: the log on disk, one short line on the screen, notices."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before transformers' Trainer, which imports torchvision

from tqdm.auto import tqdm  # noqa: E402
from transformers import ProgressCallback, TrainerCallback  # noqa: E402

METRICS_FILE = "metrics.jsonl"
_SHORT = (
    ("loss", "loss", ".4f"),
    ("loss/sigmoid", "sigmoid", ".4f"),
    ("loss/bco_pair", "bco", ".4f"),
    ("loss/nll", "nll", ".4f"),
    ("rewards/accuracies", "accuracy", ".2f"),
    ("rewards/margins", "margin", "+.4f"),
    ("grad_norm", "grad", ".3g"),
    ("learning_rate", "lr", ".2e"),
    ("pairs_per_second", "pairs/s", ".2f"),
    ("eval_loss", "eval loss", ".4f"),
    ("eval_rewards/accuracies", "eval accuracy", ".3f"),
    ("eval_rewards/margins", "eval margin", "+.4f"),
)


def notice(text: str) -> None:
    """One line for the user, on stderr, above any progress bar; on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)


def short_line(step: int, logs: dict[str, Any]) -> str:
    """The metrics worth a glance, in one line."""
    shown = [f"{name} {logs[key]:{form}}" for key, name, form in _SHORT if isinstance(logs.get(key), (int, float))]
    return "  ".join([f"step {step}", *shown])


class ShortProgress(ProgressCallback):
    """transformers' progress bar with one short line a log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and ("loss" in logs or "eval_loss" in logs):
            self.training_bar.write(short_line(state.global_step, logs))


class ShortPrinter(TrainerCallback):
    """The same short line where there is no progress bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_local_process_zero and ("loss" in logs or "eval_loss" in logs):
            print(short_line(state.global_step, logs), flush=True)


class MetricsFile(TrainerCallback):
    """Appends every logged step to ``metrics.jsonl``, numbers unrounded."""

    def __init__(self, output_dir: str) -> None:
        self.file = Path(output_dir) / METRICS_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A fresh run starts a fresh file; a resumed one forgets the lines after its checkpoint: they come again."""
        if not state.is_world_process_zero:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() and state.global_step else []
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        self.file.write_text("".join(line + "\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.file.open("a") as out:
                out.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut short by a kill
        return float("inf")


class StepClock(TrainerCallback):
    """Adds up the time of optimizer steps, without logging, saving and evaluating between them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = time.perf_counter()

    def start(self) -> None:
        """A step begins: its data are being fetched."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
