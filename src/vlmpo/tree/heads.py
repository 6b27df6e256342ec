"""What a family does to its logits after the projection to the vocabulary.

Most do nothing. Where one scales or caps them, log-probabilities read from the bare projection would be silently wrong.
The names in configs are no guide (``logits_scaling`` divides in one family and multiplies in the next, and a
vision-language model may ignore the soft cap of its text tower), so the families are listed one by one, and the
start-up check compares every model with its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """``softcap * tanh(scale * x / softcap)`` of the projection ``x``; ``scale * x`` where there is no soft cap."""

    scale: float = 1.0
    softcap: float | None = None

    def of(self, projected: Tensor) -> Tensor:
        """The family's logits."""
        logits = projected if self.scale == 1.0 else projected * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient with respect to the projection, from that with respect to ``logits``, the map's own output."""
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap) ** 2)  # tanh' = 1 - tanh^2
        return grad if self.scale == 1.0 else grad * self.scale


PLAIN = LogitTransform()

_SOFT_CAPPED = frozenset({"gemma2", "gemma3_text"})
_DIVIDED = frozenset({"granite", "granitemoe", "granitemoeshared"})  # by config.logits_scaling
_MULTIPLIED = frozenset({"cohere", "cohere2"})  # by config.logit_scale


def logit_transform(config: Any) -> LogitTransform:
    """The map of the family that ``config``, a whole model's, belongs to; none for families not listed here."""
    family = config.model_type
    if family in _SOFT_CAPPED:
        return LogitTransform(softcap=config.final_logit_softcapping)
    if family in _DIVIDED:
        return LogitTransform(scale=1.0 / config.logits_scaling)
    if family in _MULTIPLIED:
        return LogitTransform(scale=config.logit_scale)
    return PLAIN
