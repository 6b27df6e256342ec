"""Check the values of TrainingArguments that transformers takes as they come, before anything is loaded.

A wrong one would otherwise end a run with a traceback once the model is in memory, or change it without notice.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from vlmpo.errors import RecipeError

_NUMBERS = {bool, int, float}
_RANGES: dict[str, dict[str, Any]] = {
    name: limits
    for names, limits in (
        ("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps", {"ge": 1}),
        ("save_total_limit dataloader_prefetch_factor eval_accumulation_steps torch_empty_cache_steps", {"ge": 1}),
        ("num_train_epochs logging_steps save_steps eval_steps ddp_timeout", {"gt": 0}),
        ("learning_rate weight_decay adam_epsilon max_grad_norm warmup_steps eval_delay", {"ge": 0}),
        ("dataloader_num_workers", {"ge": 0}),
        ("adam_beta1 adam_beta2", {"ge": 0, "lt": 1}),
        ("seed data_seed", {"ge": 0, "lt": 2**32}),
        ("max_steps", {"ge": -1}),  # -1: as many as the epochs have
    )
    for name in names.split()
}
_WORDS = {
    "greater than or equal to": "at least",
    "greater than": "above",
    "less than": "below",
    "a valid number": "a number",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
}


def check_numbers(args: TrainingArguments) -> None:
    """Check every setting that is a number or yes/no; write ``"1e-6"``, as YAML may read it, as a number.

    Raises:
        ValueError: one is of another kind, not finite, or out of its range.
    """
    for name, adapter in _adapters().items():
        value = getattr(args, name)
        if value is None and type(args).__dataclass_fields__[name].default is None:
            continue
        try:
            number = adapter.validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{name} must be {_wanted(error)}, not {value!r:.80}") from None
        if isinstance(value, bool) and not isinstance(number, bool):  # pydantic takes True for 1
            raise ValueError(f"{name} must be a number, not {value}")
        setattr(args, name, number)
    if args.neftune_noise_alpha:
        raise ValueError("neftune_noise_alpha adds noise to the policy alone, whose reference has none; leave it out")


@cache
def _adapters() -> dict[str, TypeAdapter[Any]]:
    """Return what checks each setting of transformers whose type is a number or yes/no, or None besides."""
    hints = get_type_hints(TrainingArguments)
    plain = {name: hint for name, hint in hints.items() if set(_members(hint)) - {types.NoneType} <= _NUMBERS}
    adapters = {}
    for name, hint in plain.items():
        if name in TrainingArguments.__dataclass_fields__:
            limits: dict[str, Any] = {"allow_inf_nan": False} if float in _members(hint) else {}
            limited: Any = Annotated[hint, Field(**limits, **_RANGES.get(name, {}))]
            adapters[name] = TypeAdapter(limited)
    return adapters


def _wanted(error: ValidationError) -> str:
    """Say what is expected in the words of vlmpo's own messages."""
    wanted = error.errors()[0]["msg"].removeprefix("Input should be ").partition(",")[0]
    for library, ours in _WORDS.items():
        wanted = wanted.replace(library, ours)
    return wanted


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, types.UnionType) else get_args(hint) or (hint,)


def check_surroundings(args: TrainingArguments) -> None:
    """Check that optimizer, schedule and reporters can be made with these settings, and that a launcher is there.

    Raises:
        RecipeError: one cannot: a package is missing, or a setting of its own is wrong.
    """
    named = {"optim": str(getattr(args.optim, "value", args.optim)), "lr_scheduler_type": args.lr_scheduler_type.value}
    with _told("optim", f"{named['optim']} cannot be used: "):
        _try_optimizer(args)
    with _told("lr_scheduler_type", f"{named['lr_scheduler_type']} cannot be used: "):
        _try_schedule(args)
    with _told("report_to"):
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    if args.fsdp and args.world_size == 1:
        raise RecipeError(
            "training.fsdp: it shards a model over processes, and there is one; start with torchrun --nproc_per_node N "
            "-m vlmpo train ... (docs/distributed.md), or leave it out"
        )


@contextmanager
def _told(key: str, before: str = "") -> Iterator[None]:
    try:
        yield
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise RecipeError(f"training.{key}: {before}{' '.join(str(error).split())}") from None


def _try_optimizer(args: TrainingArguments) -> None:
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError as error:
        if "model" not in str(error):  # some need the model: they are tried when it is there
            raise


def _try_schedule(args: TrainingArguments) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(100),
        num_training_steps=100,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def refuse_missing_deepspeed(settings: Any) -> None:
    """Raise RecipeError if ``training.deepspeed`` is set and the package is not installed."""
    if settings and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError("training.deepspeed: the package deepspeed is not installed; pip install deepspeed")
