"""vlmpo: Mixed Preference Optimization for vision-language models.

The names below are loaded when first used, so that ``import vlmpo`` and the command line's help need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmpo.data.records import Message, PreferencePair, Verdict
    from vlmpo.errors import VlmpoError
    from vlmpo.loss import LossOutput, RewardShift, mpo_loss
    from vlmpo.scoring import response_logps
    from vlmpo.train.config import MPOConfig
    from vlmpo.train.trainer import MPOTrainer
    from vlmpo.verifiers.verifiers import verify

_HOMES = {
    "Message": "vlmpo.data.records",
    "PreferencePair": "vlmpo.data.records",
    "VlmpoError": "vlmpo.errors",
    "LossOutput": "vlmpo.loss",
    "mpo_loss": "vlmpo.loss",
    "RewardShift": "vlmpo.loss",
    "response_logps": "vlmpo.scoring",
    "MPOConfig": "vlmpo.train.config",
    "MPOTrainer": "vlmpo.train.trainer",
    "Verdict": "vlmpo.data.records",
    "verify": "vlmpo.verifiers.verifiers",
}
__all__ = [
    "LossOutput",
    "MPOConfig",
    "MPOTrainer",
    "Message",
    "PreferencePair",
    "RewardShift",
    "Verdict",
    "VlmpoError",
    "mpo_loss",
    "response_logps",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmpo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
