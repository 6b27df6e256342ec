"""The phases of a training step: marked by CUDA events or the clock while it runs, read once all steps are done."""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

PHASES = ("feeding", "reference", "forward", "backward", "optimizer", "other")
_END = "end of a step"


class Phases:
    """Marks when phases begin and end; a phase within another stops the outer one's time.

    Nothing waits for the device in between: on CUDA a mark is an event on the device's own time line, so that a phase's
    seconds are what the device spent on it or waited in it, and the phases of a step add up to the step.

    Attributes:
        ended: number of steps that ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, str]] = []  # a moment, and the phase that begins at it
        self._open: list[str] = []
        self.ended = 0

    def _mark(self, phase: str) -> None:
        moment: Any = time.perf_counter()
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((moment, phase))

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Count the time of the body as ``phase``."""
        self._open.append(phase)
        self._mark(phase)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else "other")

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, its time counted as ``phase``."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return function(*args, **kwargs)

        return timed

    def end_step(self) -> None:
        """Mark the end of a step."""
        self._mark(_END)
        self.ended += 1

    def attach(self, trainer: Any) -> None:
        """Mark the phases of the steps of an MPOTrainer or a DPOTrainer, but for their ends."""
        trainer.get_batch_samples = self.around("feeding", trainer.get_batch_samples)
        trainer.compute_loss = self.around("forward", trainer.compute_loss)
        trainer.accelerator.backward = self.around("backward", trainer.accelerator.backward)
        reference, model = getattr(trainer, "reference", None), getattr(trainer, "ref_model", None)
        if reference is not None:
            reference.response_logps = self.around("reference", reference.response_logps)
        if model is not None:
            model.forward = self.around("reference", model.forward)

    def steps(self, first: int) -> list[dict[str, float]]:
        """Return the seconds of each phase, and of the ``step``, of all steps but the ``first`` ones.

        What follows a step's last backward pass is the optimizer's: clipping, its step, and zeroing gradients.

        Args:
            first: steps to leave out; at least 1, as a step is timed from the end of the one before.
        """
        if self._cuda:
            torch.cuda.synchronize()
        ends = [at for at, (_, phase) in enumerate(self._marks) if phase == _END]
        return [self._seconds(self._marks[begin : end + 1]) for begin, end in itertools.pairwise(ends[first - 1 :])]

    def _seconds(self, marks: list[tuple[Any, str]]) -> dict[str, float]:
        phases = ["other", *(phase for _, phase in marks[1:-1])]
        last = max((at for at, phase in enumerate(phases) if phase == "backward"), default=len(phases))
        seconds = dict.fromkeys(PHASES, 0.0)
        for at, ((begin, _), (end, _)) in enumerate(itertools.pairwise(marks)):
            phase = "optimizer" if phases[at] == "other" and at > last else phases[at]
            seconds[phase] += self._between(begin, end)
        return {**seconds, "step": self._between(marks[0][0], marks[-1][0])}

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000 if self._cuda else float(end - begin)


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each phase over the steps."""
    return {phase: statistics.median(step[phase] for step in steps) for phase in PHASES}
