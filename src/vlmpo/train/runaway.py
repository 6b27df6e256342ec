"""Warn of a run that runs away while its numbers are still finite, each kind once, with the remedy.

The judges are functions of a short history; :class:`RunawayWatch` keeps the history.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SPIKE = 100.0  # times the median of the gradient's norm
NORMS_KEPT = 200
NORMS_NEEDED = 20
FALLING_STEPS = 50
BLOCKS = 5  # of these steps: each lower than the one before
FALLEN = 1.0  # nats below the reference, at least
MAX_MARGIN = 50.0
MAX_SHIFT = 10.0
SHIFT_LOGS = 10  # in a row in which delta moved further away from 0


@dataclass(frozen=True)
class Logged:
    """Holds one log of a run.

    Attributes:
        step: optimizer steps done.
        chosen, rejected: mean log-probs of the responses, minus the reference's: in nats, whatever their length.
        margin: mean reward margin.
        shift: delta.
    """

    step: int
    chosen: float
    rejected: float
    margin: float
    shift: float


def norm_spikes(norms: Sequence[float]) -> str | None:
    """Return a warning if the last gradient norm is far above the median of those before it."""
    *before, last = norms
    if len(before) < NORMS_NEEDED or last <= SPIKE * (median := statistics.median(before)) or median <= 0:
        return None
    return (
        f"the gradient norm is {last:.4g}, {last / median:.0f} times its median over the last {len(before)} steps; "
        "lower training.learning_rate, or set training.max_grad_norm (1.0)"
    )


def both_fall(history: Sequence[Logged]) -> str | None:
    """Return a warning if chosen and rejected responses alike have become less likely for FALLING_STEPS steps.

    The logs of these steps are cut into blocks, of which each must be lower than the one before, and the last lower
    than anything before: the noise of single batches does not do that.
    """
    since = [at for at, logged in enumerate(history) if history[-1].step - logged.step <= FALLING_STEPS]
    start = min(since[0], len(history) - BLOCKS)
    if start < 0 or history[-1].step - history[start].step < FALLING_STEPS:
        return None
    for name in ("chosen", "rejected"):
        values = [getattr(logged, name) for logged in history]
        recent = values[start:]
        ends = [round(number * len(recent) / BLOCKS) for number in range(BLOCKS + 1)]
        means = [statistics.fmean(recent[a:b]) for a, b in itertools.pairwise(ends)]
        falls = all(later < earlier for earlier, later in itertools.pairwise(means))
        if not falls or means[-1] > -FALLEN or means[-1] > min(values[: start + ends[-2]]):
            return None
    last = history[-1]
    return (
        f"chosen and rejected responses have both become less likely for {last.step - history[start].step} steps "
        f"(now {last.chosen:.4g} and {last.rejected:.4g} nats against the reference); raise loss.weights.nll or "
        "loss.beta, or lower training.learning_rate"
    )


def margin_is_large(history: Sequence[Logged]) -> str | None:
    """Return a warning if the reward margin is beyond MAX_MARGIN."""
    margin = history[-1].margin
    if abs(margin) <= MAX_MARGIN:
        return None
    return (
        f"the reward margin is {margin:.4g}, beyond {MAX_MARGIN:.0f}: the policy has left its reference far behind; "
        "stop earlier, lower training.learning_rate, or raise loss.beta"
    )


def shift_drifts(history: Sequence[Logged]) -> str | None:
    """Return a warning if delta is beyond MAX_SHIFT and has moved away from 0 in each of the last logs."""
    sizes = [abs(logged.shift) for logged in history[-SHIFT_LOGS - 1 :]]
    grows = all(later > earlier for earlier, later in itertools.pairwise(sizes))
    if len(sizes) <= SHIFT_LOGS or sizes[-1] <= MAX_SHIFT or not grows:
        return None
    return (
        f"delta, the reward shift, is {history[-1].shift:.4g} and has moved away from 0 in {SHIFT_LOGS} logs in a row: "
        "rewards drift; lower training.learning_rate, or take loss.weights.bco_pair down"
    )


_JUDGES = {
    "both log-probs fall": both_fall,
    "reward margin": margin_is_large,
    "reward shift": shift_drifts,
}


class RunawayWatch:
    """Keeps the history of a run, and warns of each kind of run-away once.

    Args:
        beta: scale of the implicit rewards.

    Attributes:
        warnings: those given up to now, by kind.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.warnings: dict[str, str] = {}
        self._norms: deque[float] = deque(maxlen=NORMS_KEPT)
        self._history: deque[Logged] = deque(maxlen=10 * FALLING_STEPS)

    def see_norm(self, step: int, norm: float) -> str | None:
        """Take in the gradient's norm of one optimizer step; return a warning if it is new."""
        if not math.isfinite(norm):
            return None
        self._norms.append(norm)
        return None if "gradient norm" in self.warnings else self._once("gradient norm", step, norm_spikes(self._norms))

    def see_log(self, step: int, logs: Mapping[str, float]) -> list[str]:
        """Take in a training log; return the warnings that are new. Logs without rewards say nothing."""
        names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "reward_shift")
        values = [logs.get(name, math.nan) for name in names]
        if not all(math.isfinite(value) for value in values):
            return []
        chosen, rejected, margin, shift = values
        self._history.append(Logged(step, chosen / self.beta, rejected / self.beta, margin, shift))
        history = list(self._history)
        open_kinds = [kind for kind in _JUDGES if kind not in self.warnings]
        found = [self._once(kind, step, _JUDGES[kind](history)) for kind in open_kinds]
        return [warning for warning in found if warning is not None]

    def _once(self, kind: str, step: int, warning: str | None) -> str | None:
        if warning is None:
            return None
        self.warnings[kind] = f"step {step}: {warning}"
        return self.warnings[kind]
