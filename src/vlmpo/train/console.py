"""Show a run on the screen: one line that moves on a terminal, one line a log elsewhere; and a line an evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import TrainerCallback

from vlmpo.log import MovingLine, cell, columns, fit, line_width, logger
from vlmpo.train.callbacks import StepClock
from vlmpo.train.metrics import FINAL

_BAR = 16  # columns
_LONGEST_NAME = 40  # columns of a data set's name in a line


class Shown(NamedTuple):
    """Says how a metric is shown.

    Attributes:
        metric: its name in the log.
        form: what is shown.
        rank: which are left out first if a line has no room: those of the highest rank.
    """

    metric: str
    form: str
    rank: int


_TRAINING = (
    Shown("loss", "loss {:.4f}", 0),
    Shown("rewards/margins", "margin {:+.4f}", 2),
    Shown("rewards/accuracies", "accuracy {:.2f}", 3),
    Shown("grad_norm", "grad {:.3g}", 7),
    Shown("learning_rate", "lr {:.2e}", 6),
    Shown("pairs_per_second", "{:.4g} pairs/s", 1),
    Shown("data_wait_share", "waiting {:.0%}", 5),
)
_EVALUATION = (
    Shown("loss", "loss {:.4f}", 0),
    Shown("rewards/accuracies", "accuracy {:.3f}", 1),
    Shown("rewards/margins", "margin {:+.4f}", 2),
    Shown("answers/accuracy", "answers right {:.3f}", 3),
)
_BAR_RANK, _LEFT_RANK = 4, 1


def figures(logs: Mapping[str, Any], shown: Sequence[Shown] = _EVALUATION) -> list[tuple[str, int]]:
    """Return the metrics of ``logs`` that are ``shown``, in words, each with its rank."""
    known = ((one, logs.get(one.metric)) for one in shown)
    return [(one.form.format(value), one.rank) for one, value in known if isinstance(value, int | float)]


def fitting(parts: Sequence[tuple[str, int]], width: int) -> str:
    """Join ``parts`` to a line of at most ``width`` columns; those of the highest rank are left out first."""
    kept = list(parts)
    while len(kept) > 1 and columns("  ".join(text for text, _ in kept)) > width:
        kept.remove(max(kept, key=lambda part: part[1]))
    return fit("  ".join(text for text, _ in kept), width)


def duration(seconds: float) -> str:
    """Format a time: ``0:07``, ``12:34``, ``3:02:01``, ``2 d 3:02:01``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days} d {clock}" if days else clock


def step_line(step: int, steps: int, logs: Mapping[str, Any], left: float | None, width: int, bar: bool = False) -> str:
    """Return the line of a training step.

    Args:
        step, steps: the step, and how many there will be.
        logs: the last logged metrics.
        left: seconds to the end, if they are known.
        width: its most columns.
        bar: draw how far the run has come.
    """
    waits = logs.get("data_wait_share", 0.0) > StepClock.TOO_LONG
    known = logs if waits else {name: value for name, value in logs.items() if name != "data_wait_share"}
    parts = [(f"step {step}/{steps}", -1)]
    if bar:
        done = round(_BAR * step / max(steps, 1))
        parts.append(("━" * done + "─" * (_BAR - done), _BAR_RANK))
    parts += figures(known, _TRAINING)
    if left is not None:
        parts.append((f"{duration(left)} left", _LEFT_RANK))
    return fitting(parts, width)


class RunConsole(TrainerCallback):
    """Shows how a run goes, on the first rank.

    On a terminal one line moves at the bottom; elsewhere, and under ``disable_tqdm``, there is a plain line a log. An
    evaluation is a line that stays. All go through the logger, but for the line that moves.

    Attributes:
        with_opening: whether to say before the first step what the run is.
    """

    def __init__(self) -> None:
        self.with_opening = True
        self._line: MovingLine | None = None
        self._logs: dict[str, Any] = {}  # the last training log
        self._evaluated: list[list[tuple[str, int]]] = []  # lines that wait for whether they are the best
        self._training = False
        self._began: tuple[float, int] | None = None  # the time, and the steps that were done then

    # ---- training ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training, self._began, self._logs = True, None, {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, and the line that moves: all that comes before the first step has been said."""
        self.judged()
        if self._began is None:
            self._began = (time.monotonic(), state.global_step)
            if state.is_world_process_zero and not args.disable_tqdm and MovingLine.possible():
                self._line = MovingLine()
                self._draw(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._line is not None and self._line.is_due():
            self._draw(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs and "empty_steps" not in logs:
            return
        self._logs = logs
        if self._line is not None:
            self._draw(state)
        elif state.is_world_process_zero:
            logger.info(step_line(state.global_step, state.max_steps, logs, self._left(state), line_width()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the line that moves away, however training has ended."""
        self.judged()
        self._training = False
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _left(self, state: Any) -> float | None:
        if self._began is None or state.global_step <= self._began[1]:
            return None
        seconds = (time.monotonic() - self._began[0]) / (state.global_step - self._began[1])
        return seconds * (state.max_steps - state.global_step)

    def _draw(self, state: Any) -> None:
        if self._line is not None:
            left, width = self._left(state), line_width()
            self._line.show(step_line(state.global_step, state.max_steps, self._logs, left, width, bar=True))

    # ---- evaluation ----

    def evaluated(self, args: Any, state: Any, sets: Mapping[str, Mapping[str, Any]]) -> None:
        """Show an evaluation, a line for each of ``sets``: its metrics by their plain names.

        While a run looks for its best checkpoint the lines wait for :meth:`judged`.
        """
        if not state.is_world_process_zero:
            return
        at = f"step {state.global_step}/{state.max_steps}" if state.max_steps else ""
        for name, metrics in sets.items():
            if name.startswith(FINAL):  # shown with its intervals by whoever asked for it
                continue
            parts = [(fit(cell(name), _LONGEST_NAME), -1), (at, -1), *figures(metrics)]
            self._evaluated.append([part for part in parts if part[0]])
        if not (self._training and args.metric_for_best_model is not None):
            self.judged()

    def judged(self, best: str = "") -> None:
        """Show the evaluation that waits, if one does; ``best`` says whether it is the best so far, or which is."""
        lines, self._evaluated = self._evaluated, []
        if not lines:
            return
        lines[-1] += [(best, 0)] if best else []
        for line in lines:
            logger.info(fitting(line, line_width()))
