"""Keep an exponential moving average of the trained weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from vlmpo.errors import RecipeError, RunError
from vlmpo.tree.chunked_logprobs import wide

AVERAGE_FILE = "ema.safetensors"  # in a checkpoint
AVERAGE_FOLDER = "ema"  # in a run folder: the averaged model, which loads like any other


class WeightAverage(TrainerCallback):
    """Averages the weights: ``a_0 = w_0``; after optimizer step t, ``a_t = decay * a_(t-1) + (1 - decay) * w_t``.

    There is no warm-up of the decay and no bias correction: the average starts from the weights that training starts
    from. It is kept for the parameters that train, on their device, in float32 or better whatever their dtype. A step
    that the loss scaler skipped does not count. Every rank of a data-parallel run keeps the same average.

    The trainer calls :meth:`save` and :meth:`start_from`: a checkpoint must hold the average before it is marked as
    complete, and ``on_save`` is called after that.

    Args:
        decay: in (0, 1); near ``1 - 1/n`` it averages over about n steps.

    Attributes:
        averages: by name of the parameter.
        paused: whether the step under way moves no weight, and does not count either.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        self.paused = False
        self._checkpoint: str | os.PathLike[str] | None = None

    @classmethod
    def for_run(cls, decay: float | None, sharded: bool) -> WeightAverage | None:
        """Return an average with ``decay``; None if it is None or 0.

        Raises:
            RecipeError: the weights are sharded.
        """
        if not decay:
            return None
        if sharded:
            raise RecipeError(
                "training.ema_decay: an average needs whole weights, and FSDP and DeepSpeed shard them; leave "
                "ema_decay out, or train data-parallel (DDP)"
            )
        return cls(decay)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start from the model's weights, or from the average of the checkpoint given to :meth:`start_from`.

        Raises:
            RunError: that average is of other parameters than those that train.
        """
        self.averages = {name: weight.to(wide(weight.dtype), copy=True) for name, weight in _trained(model)}
        if self._checkpoint is None:
            return
        with safe_open(Path(self._checkpoint) / AVERAGE_FILE, framework="pt") as saved:
            if set(saved.keys()) != self.averages.keys():
                names = ", ".join(sorted(set(saved.keys()) ^ self.averages.keys())[:3])
                raise RunError(
                    f"the average in {self._checkpoint} is of other parameters than those that train: {names}; "
                    "train the same ones, or start anew"
                )
            for name, average in self.averages.items():
                average.copy_(saved.get_tensor(name))

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Update the average with the weights of one step."""
        if not self.paused and not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            for name, weight in _trained(model):
                self.averages[name].mul_(self.decay).add_(weight.to(wide(weight.dtype)), alpha=1.0 - self.decay)

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write the average into a checkpoint folder."""
        tensors = {name: average.contiguous() for name, average in self.averages.items()}
        save_file(tensors, Path(checkpoint) / AVERAGE_FILE, metadata={"decay": repr(self.decay)})

    def start_from(self, checkpoint: str | os.PathLike[str] | None) -> None:
        """Continue the average in ``checkpoint`` when training begins; None starts from the model's weights.

        Raises:
            RunError: the checkpoint has no average, or one of another decay.
        """
        self._checkpoint = checkpoint
        if checkpoint is None:
            return
        file = Path(checkpoint) / AVERAGE_FILE
        if not file.is_file():
            raise RunError(
                f"training.ema_decay: {checkpoint} has no average to continue ({AVERAGE_FILE} is missing); "
                "leave ema_decay out, or start anew"
            )
        with safe_open(file, framework="pt") as saved:
            decay = float((saved.metadata() or {}).get("decay", "nan"))
        if decay != self.decay:
            raise RunError(
                f"training.ema_decay is {self.decay}, but the average in {checkpoint} was kept with {decay}; "
                f"set it to {decay}, or start anew"
            )

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Give ``model`` the averaged weights, rounded to its dtype, in the body; then restore its own, bit for bit."""
        weights = {name: weight.to("cpu", copy=True) for name, weight in _trained(model)}
        try:
            _set_trained(model, self.averages)
            yield
        finally:
            _set_trained(model, weights)


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()


def _set_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in _trained(model):
        weight.copy_(weights[name])
