"""Train the vision tower, the projector and the text model with different learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vlmpo.errors import RecipeError
from vlmpo.log import logger
from vlmpo.models.families import part_of

PARTS = ("vision", "projector", "text")


def count_by_part(model: nn.Module, trained_only: bool = False) -> dict[str, int]:
    """Return the number of ``model``'s parameters by part; parts without any are left out."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained_only:
            # DeepSpeed's stage 3 leaves an empty tensor in place and keeps its size beside it.
            counts[part_of(name)] += getattr(parameter, "ds_numel", parameter.numel())
    return {part: count for part, count in counts.items() if count}


def check_values(rates: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``rates`` maps names of PARTS to rates above 0."""
    if not isinstance(rates, Mapping):
        raise ValueError(f"learning_rates: expected a rate for each of some parts, {{text: 1e-6}}, got {rates!r:.80}")
    for part, rate in rates.items():
        if part not in PARTS:
            raise ValueError(f"learning_rates.{part}: no such part; there are {', '.join(PARTS)}")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
            raise ValueError(
                f"learning_rates.{part}: expected a rate above 0, got {rate!r} (model.freeze stops a part)"
            )


def check_parts(model: nn.Module, rates: Mapping[str, float]) -> dict[str, int]:
    """Return the number of parameters that train, by part.

    Raises:
        RecipeError: ``model`` lacks a part in ``rates``, or trains nothing of it; or the model's vision tower has an
            unknown name, so that its parameters would be taken for text.
    """
    present, trained = count_by_part(model), count_by_part(model, trained_only=True)
    if getattr(getattr(model, "config", None), "vision_config", None) is not None and "vision" not in present:
        raise RecipeError(
            f"training.learning_rates: which parameters of {type(model).__name__} are its vision tower is not known; "
            "leave learning_rates out"
        )
    for part in rates:
        if part not in trained:
            why = "is frozen as a whole" if part in present else "is not in this model"
            parts = ", ".join(f"{name} ({count:,})" for name, count in trained.items())
            raise RecipeError(f"training.learning_rates.{part}: that part {why}; what trains: {parts}")
    return trained


class PartRates:
    """Gives parts of the model their learning rates, beside transformers' one base rate.

    Args:
        model: whose parameters train.
        rates: by part; a part without one takes the base rate.
        base: ``learning_rate``.

    Attributes:
        latest: the parts' rates at the last call of :meth:`base_rate`, by their names in the log.

    Raises:
        RecipeError: see :func:`check_parts`.
    """

    def __init__(self, model: nn.Module, rates: Mapping[str, float], base: float) -> None:
        self.rates = rates
        self.base = base
        self.latest: dict[str, float] = {}
        self._part_of_group: list[str] = []
        trained = check_parts(model, rates)
        parts = (f"{part} {count:,} at {rates.get(part, base):g}" for part, count in trained.items())
        logger.info(f"parameters that train, and their rates: {', '.join(parts)}")

    @classmethod
    def for_run(cls, args: Any, model: nn.Module, optimizer: Any, deepspeed_plugin: Any) -> PartRates | None:
        """Return the rates of ``args.learning_rates``; None if it is not set.

        Raises:
            RecipeError: the optimizer was made by the caller or is DeepSpeed's; or see :func:`check_parts`.
        """
        if not args.learning_rates:
            return None
        if optimizer is not None:
            raise RecipeError("learning_rates: an optimizer was passed, with its rates; leave one of them out")
        if deepspeed_plugin is not None and "optimizer" in deepspeed_plugin.deepspeed_config:
            raise RecipeError("training.learning_rates: the DeepSpeed configuration has an optimizer; remove it there")
        return cls(model, args.learning_rates, args.learning_rate)

    def split(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Split each parameter group of a fresh ``optimizer`` by part, and give each part its rate.

        Groups keep everything else, so weight decay stays where transformers put it.

        Raises:
            RecipeError: the optimizer keeps other parameters than those of ``model`` that train.
        """
        named = model.named_parameters()
        part_of_id = {id(parameter): part_of(name) for name, parameter in named if parameter.requires_grad}
        ids = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        if sorted(ids) != sorted(part_of_id):
            raise RecipeError(f"training.learning_rates: {type(optimizer).__name__} takes no rates by part; set optim")
        groups = []
        self._part_of_group = []
        for group in optimizer.param_groups:
            for part in PARTS:
                parameters = [parameter for parameter in group["params"] if part_of_id[id(parameter)] == part]
                if parameters:
                    groups.append({**group, "params": parameters, "lr": self.rates.get(part, group["lr"])})
                    self._part_of_group.append(part)
        optimizer.param_groups[:] = groups

    def base_rate(self, optimizer: torch.optim.Optimizer) -> float | None:
        """Return the base rate as now scheduled, and update ``latest``; return None before the groups are split."""
        if not self._part_of_group:
            return None
        now = dict(zip(self._part_of_group, (float(group["lr"]) for group in optimizer.param_groups), strict=True))
        self.latest = {f"learning_rate/{part}": now[part] for part in self.rates}
        at_base = [rate for part, rate in now.items() if part not in self.rates]
        if at_base:
            return at_base[0]
        first = self._part_of_group[0]  # no part has the base rate; the schedule scales all by the same factor
        return self.base * (now[first] / self.rates[first])
