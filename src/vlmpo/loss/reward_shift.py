"""delta, the reward shift of the quality term: "the moving average of previous rewards" (arXiv 2411.10442).

It is state of training: saved in every checkpoint, restored on resume, the same on every rank, untouched by
evaluation. The caller hands in sums and counts already reduced over ranks; this file knows of none.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

ShiftMode = Literal["previous", "running", "none"]


class RewardShift:
    """The reward shift delta.

    Args:
        mode: ``previous`` (the paper's words): the mean of all rewards, chosen and rejected, of all EARLIER optimizer
            steps, weighted by pairs; moves once a step, in :meth:`step`. ``running`` (InternVL's published trainer): a
            cumulative mean into which each micro-batch's mean enters BEFORE its loss, each weighing alike; moves in
            :meth:`observe`. ``none``: stays 0.

    Raises:
        ValueError: unknown mode, or a state that was saved under another mode.
    """

    def __init__(self, mode: ShiftMode = "previous") -> None:
        if mode not in get_args(ShiftMode):
            raise ValueError(f"reward shift must be one of {', '.join(get_args(ShiftMode))}, not {mode!r}")
        self.mode: ShiftMode = mode
        self._sum = 0.0  # of the rewards behind value (previous), or of micro-batch means (running)
        self._count = 0.0
        self._pending_sum = 0.0  # previous: rewards of the optimizer step under way
        self._pending_count = 0.0

    @property
    def value(self) -> float:
        """delta as the loss is to use it now; 0 before any reward was seen."""
        return self._sum / self._count if self._count else 0.0

    def observe(self, reward_sum: float, count: float) -> None:
        """Take in rewards: their sum and how many they are, over all ranks.

        In ``running`` mode one call is one micro-batch: ``reward_sum / count`` is its mean, whatever its size.
        A call with ``count`` 0 (a micro-batch without pairs) changes nothing.
        """
        if self.mode == "none" or count == 0:
            return
        if self.mode == "previous":
            self._pending_sum += reward_sum
            self._pending_count += count
        else:
            self._sum += reward_sum / count
            self._count += 1.0

    def step(self) -> None:
        """An optimizer step is over: in ``previous`` mode its rewards now enter delta; else nothing."""
        self._sum += self._pending_sum
        self._count += self._pending_count
        self._pending_sum = self._pending_count = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Mode and sums as JSON numbers; taken between optimizer steps, so nothing is pending."""
        return {"mode": self.mode, "sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        if state["mode"] != self.mode:
            raise ValueError(f"the saved reward shift was kept in mode {state['mode']!r}, this run has {self.mode!r}")
        self._sum, self._count = float(state["sum"]), float(state["count"])
        self._pending_sum = self._pending_count = 0.0
