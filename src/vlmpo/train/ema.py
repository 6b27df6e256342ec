"""An exponential moving average of the trained weights, beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from vlmpo.errors import RecipeError, RunError

AVERAGE_FILE = "ema.safetensors"  # in a checkpoint
AVERAGE_FOLDER = "ema"  # in a run folder: the averaged model, loadable like any other


class WeightAverage(TrainerCallback):
    """``a_0 = w_0``; after optimizer step t: ``a_t = decay * a_(t-1) + (1 - decay) * w_t``.

    No warm-up of the decay and no bias correction: the average starts from the weights training starts from. It is
    kept for the parameters that train, in float32 or better whatever their own dtype, on their device. A step that
    the loss scaler skipped is none. Every rank of a data-parallel run keeps the same average.

    Args:
        decay: in (0, 1); near ``1 - 1/n`` it looks back over about n steps.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        self.resume_from: str | None = None

    @classmethod
    def for_run(cls, decay: float | None, sharded: bool) -> WeightAverage | None:
        """Return the average that ``ema_decay`` asks for; None without. Raises RecipeError if weights are sharded."""
        if not decay:
            return None
        if sharded:
            raise RecipeError(
                "training.ema_decay: an average is kept of whole weights, and FSDP and DeepSpeed hold parts of them; "
                "leave ema_decay out, or train data-parallel (DDP)"
            )
        return cls(decay)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start from the model's weights, or from the checkpoint that training goes on from."""
        self.start(model)
        if self.resume_from is not None:
            self.load(self.resume_from)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.update(model)

    def start(self, model: nn.Module) -> None:
        """Average of no step yet: the weights as they are."""
        self.averages = {name: weight.to(_wide(weight), copy=True) for name, weight in _trained(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step's weights in."""
        for name, weight in _trained(model):
            self.averages[name].mul_(self.decay).add_(weight.to(_wide(weight)), alpha=1.0 - self.decay)

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write the average into a checkpoint folder."""
        tensors = {name: average.contiguous() for name, average in self.averages.items()}
        save_file(tensors, Path(checkpoint) / AVERAGE_FILE, metadata={"decay": repr(self.decay)})

    def check(self, checkpoint: str | os.PathLike[str]) -> None:
        """Raise RunError where ``checkpoint`` has no average, or one of another decay."""
        file = Path(checkpoint) / AVERAGE_FILE
        if not file.is_file():
            raise RunError(
                f"training.ema_decay: {checkpoint} holds no average to go on with ({AVERAGE_FILE} is missing); "
                "leave ema_decay out, or start anew"
            )
        with safe_open(file, framework="pt") as saved:
            decay = float((saved.metadata() or {}).get("decay", "nan"))
        if decay != self.decay:
            raise RunError(
                f"training.ema_decay is {self.decay}, but the average in {checkpoint} was kept with {decay}; "
                "an average has one decay"
            )

    def load(self, checkpoint: str | os.PathLike[str]) -> None:
        """Take over the average of a checkpoint, whole. Raises RunError where it does not fit."""
        self.check(checkpoint)
        with safe_open(Path(checkpoint) / AVERAGE_FILE, framework="pt") as saved:
            if set(saved.keys()) != self.averages.keys():
                odd = ", ".join(sorted(set(saved.keys()) ^ self.averages.keys())[:3])
                raise RunError(f"the average in {checkpoint} is of other parameters than those that train: {odd}")
            for name, average in self.averages.items():
                average.copy_(saved.get_tensor(name))

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """``model`` with the averaged weights, rounded to its dtype; its own come back to the bit."""
        own = {name: weight.to("cpu", copy=True) for name, weight in _trained(model)}
        try:
            _put(model, self.averages)
            yield
        finally:
            _put(model, own)


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, weight in _trained(model):
        weight.copy_(weights[name])
