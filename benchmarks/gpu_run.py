"""What a part of the GPU check is given: the device, its deadline, and a place for its figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Figures = dict[str, Any]


@dataclass
class Run:
    """The device, the size and the deadline of a part.

    Attributes:
        device: where to run.
        miniature: whether to run at tiny sizes.
        deadline: when the part must end, by time.perf_counter().
        figures: of the part so far; what the part returns is added to them.
        flush: writes all figures to disk.
    """

    device: torch.device
    miniature: bool
    deadline: float
    figures: Figures = field(default_factory=dict)
    flush: Callable[[], None] = lambda: None

    def left(self) -> float:
        """Return the seconds until this part must end."""
        return self.deadline - time.perf_counter()
