"""Log to disk, measure the time of steps, and check the model before the first step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vlmpo.fileio import dump_json, replace_text
from vlmpo.log import logger
from vlmpo.train.readers import cores_of_a_rank

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends every log to ``metrics.jsonl``, with unrounded numbers; those not finite are null, and named.

    Attributes:
        kept: lines that a resumed run keeps at most: those there were when its checkpoint was written; None: all up to
            the checkpoint's step.
    """

    def __init__(self, output_dir: str) -> None:
        self.file = Path(output_dir) / METRICS_FILE
        self.kept: int | None = None

    def count_lines(self) -> int:
        """Return the number of lines written so far."""
        return len(self.file.read_bytes().splitlines()) if self.file.exists() else 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Empty the file; a resumed run keeps the lines up to its checkpoint, as later steps are run again."""
        if not state.is_world_process_zero:
            return
        lines = self.file.read_text().splitlines() if self.file.exists() and state.global_step else []
        kept = [line for line in lines if _step_of(line) <= state.global_step][: self.kept]
        replace_text(self.file, "".join(line + "\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.file.open("a") as out:
                out.write(metrics_line(state.global_step, logs) + "\n")


def metrics_line(step: int, logs: dict[str, Any]) -> str:
    """Return a log as one JSON object.

    JSON has no NaN and no infinity: such values are null, and ``not_finite`` says what they were.
    """
    odd = {name: str(value) for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)}
    return dump_json({"step": step, **logs, **({"not_finite": odd} if odd else {})}, ensure_ascii=True)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut short by a kill
        return float("inf")


class StepClock(TrainerCallback):
    """Measures the seconds of optimizer steps, and those of them spent waiting for data; warns if these are many.

    Logging, saving and evaluating do not count.
    """

    TOO_LONG = 0.05  # of a step's time

    def __init__(self) -> None:
        self._seconds = self._waited = 0.0  # of all steps
        self._taken = (0.0, 0.0)  # both at the last call of take()
        self._fetching = 0.0  # seconds spent waiting in the step under way
        self._started = time.perf_counter()
        self._logs = 0
        self._warned = False

    def start(self) -> None:
        """Start the clock: the step begins, and its data are being fetched."""
        self._started = time.perf_counter()

    def fetched(self) -> None:
        """Take the time once the data of the step are there."""
        self._fetching = time.perf_counter() - self._started

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._started
        self._waited += self._fetching

    def take(self) -> tuple[float, float]:
        """Return the seconds of the steps since the last call, and how many of them were spent waiting for data."""
        (seconds, waited), self._taken = self._taken, (self._seconds, self._waited)
        return self._seconds - seconds, self._waited - waited

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Warn once if waiting takes too long. Ignore the first log, which the start of the workers dominates."""
        if "data_wait_share" not in logs:
            return
        self._logs += 1
        if self._logs > 1 and logs["data_wait_share"] > self.TOO_LONG and not self._warned:
            self._warned = True
            logger.info(waiting_line(logs["data_wait_share"], "of the last steps' time", args.dataloader_num_workers))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._seconds:
            share = self._waited / self._seconds
            advice = not self._warned  # once is enough
            logger.info(waiting_line(share, "of all steps' time", args.dataloader_num_workers, advice))


def waiting_line(share: float, of_what: str, workers: int, advice: bool = True) -> str:
    """Format the share of time spent waiting for data, and with ``advice`` what to do if it is too much."""
    line = f"waiting for data: {share:.1%} {of_what}"
    if share <= StepClock.TOO_LONG or not advice:
        return line
    cores = cores_of_a_rank()
    if workers < cores:
        return f"{line}; raise training.dataloader_num_workers (now {workers}; {cores} cores for this rank)"
    return f"{line}; more cores or a lower data.max_tiles would help ({workers} workers on {cores} cores)"


class BeforeFirstStep(TrainerCallback):
    """Calls each of ``checks`` once: when the model has been wrapped and no step has been made."""

    def __init__(self, *checks: Callable[[], None]) -> None:
        self._checks = checks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checks, self._checks = self._checks, ()
        for check in checks:
            check()
