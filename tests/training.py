"""Short training runs the tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.tiny_models import model as tiny_model
from tests.tiny_models import processor, random_pair
from vlmpo import MPOConfig, MPOTrainer

TRAINERS = ("callbacks", "ref_model", "peft_config", "eval_dataset", "optimizers")  # its own keywords


class Gradients(TrainerCallback):
    """Keeps every optimizer step's gradient, all parameters concatenated, float64."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        self.steps.append(torch.cat([grad.flatten().double() for grad in grads]).clone())


class AfterSteps(TrainerCallback):
    """Calls a function with the number of each optimizer step once it is made."""

    def __init__(self, call: Callable[[int], Any]) -> None:
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.call(state.global_step)


def pairs(count: int, first: int = 0) -> list:
    """Pairs of mixed kinds: one image, two images, none."""
    return [random_pair(seed, images=(1, 2, 0)[seed % 3]) for seed in range(first, first + count)]


def config(folder: Path, **settings: Any) -> MPOConfig:
    """Settings for a short run: every step logged, nothing saved, no clipping, a constant rate, no progress bar."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return MPOConfig(**{**defaults, **settings})


def trainer(folder: Path, data: Any, *, model: Any = None, dtype: torch.dtype = torch.float32, **settings: Any):
    """An MPOTrainer on a fresh tiny model; takes MPOConfig's keywords and the trainer's own."""
    extra = {k: settings.pop(k) for k in TRAINERS if k in settings}
    return MPOTrainer(
        model=tiny_model(dtype=dtype) if model is None else model,
        args=config(folder, **settings),
        train_dataset=data,
        processing_class=processor(),
        **extra,
    )


def logged(folder: Path) -> list[dict[str, Any]]:
    """The logged optimizer steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over norm."""
    return float((a - b).norm() / b.norm())


def flat_weights(model: torch.nn.Module) -> torch.Tensor:
    """All parameters concatenated."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
