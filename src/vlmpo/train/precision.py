"""Decide in which precision a run reads and trains its model, and say so.

``float32``: in the weights' own type. ``bf16``: in bfloat16, over float32 weights as masters
(:mod:`vlmpo.models.masters`; FSDP2 and DeepSpeed do it their own way). ``autocast``: float32 weights, each operation
converted by torch's autocast, to bfloat16, or to float16 under ``fp16``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.training_args import ParallelMode

from vlmpo import compat
from vlmpo.errors import RecipeError, RunError
from vlmpo.log import logger
from vlmpo.models.adapters import keeps_float32_matrices
from vlmpo.models.masters import can_be_masters
from vlmpo.train.checkpoint import read_state
from vlmpo.train.checkpoint_io import checkpoints_in
from vlmpo.train.config import MPOConfig, asked_precision
from vlmpo.train.provenance import Settings, precision_of, settings_of
from vlmpo.train.sharding import passes_are_shared

MANIFEST = "manifest.json"
_WORDS = {
    "float32": "float32",
    "bf16": "bf16 passes over float32 weights; gradients are summed in float32",
    "autocast": "autocast over the weights as they are",
}


def choose_precision(
    args: MPOConfig, model: nn.Module, before: tuple[str, str] | None, say: Callable[[str], object] | None = None
) -> str:
    """Return the precision of a run, one of the above, or the type of weights that are not float32; say why.

    Sets ``args.mixed_precision`` to what accelerate is to do.

    Args:
        args: the settings.
        model: the policy, loaded.
        before: from :func:`recorded_precision`: ``auto`` goes on in it.
        say: called with a line if the precision is not just what was asked for; None: it is logged.

    Raises:
        RecipeError: ``precision`` asks for what the model's weights do not allow, or a launcher for fp8.
    """
    if args.mixed_precision == "fp8":
        raise RecipeError("mixed_precision: fp8, which the launcher asks for, is not known here; bf16 and fp16 are")
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        return {"bf16": "bf16", "fp16": "autocast"}.get(args.mixed_precision, "float32")
    chosen, why = _choice(args, model, before or ("", ""))
    if chosen == "bf16" and keeps_float32_matrices(model):
        adapter = "a VeRA adapter, whose random matrices are no weights and stay float32"
        if args.precision == "bf16":
            raise RecipeError(f"training.precision: bf16 cannot read {adapter}; set autocast, or leave it out")
        chosen, why = "autocast", f"for {adapter}"
    if args.world_size > 1:  # nodes may differ
        chosen, why = broadcast_object_list([(chosen, why)])[0]
    if args.fp16 and not why and args.device.type == "cpu":
        why = "fp16 is for GPUs; on a CPU it converts nothing"
    half = "fp16" if args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16" else "bf16"
    by_accelerate = chosen == "autocast" or (chosen == "bf16" and is_sharded(args))
    args.mixed_precision = half if by_accelerate else "no"
    if why:
        (say or logger.info)(f"precision: {precision_words(chosen)} ({why})")
    return chosen


def precision_words(precision: str) -> str:
    """Return a precision in words."""
    return _WORDS.get(precision, f"{precision}, as the weights are")


def reads_masters(args: MPOConfig, precision: str) -> bool:
    """Return whether roundings of float32 masters are read, as neither accelerate nor DeepSpeed sees to bf16."""
    return precision == "bf16" and args.mixed_precision == "no"


def is_sharded(args: MPOConfig) -> bool:
    """Return whether accelerate is asked to shard the model by FSDP, and started by a launcher, without which it can't.

    On a CPU it does not even then: see :func:`without_sharding`.
    """
    asked = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    return asked and args.parallel_mode == ParallelMode.DISTRIBUTED


def without_sharding(args: MPOConfig, accelerator: Any, precision: str) -> None:
    """Take back what FSDP was to do, if accelerate did not shard: roundings of masters are read without autocast."""
    if precision == "bf16" and args.mixed_precision == "bf16" and not passes_are_shared(accelerator):
        accelerator.native_amp, args.mixed_precision = False, "no"


def _choice(args: MPOConfig, model: nn.Module, recorded: tuple[str, str]) -> tuple[str, str]:
    """Return the precision, and why; without a reason it is what was asked for."""
    asked = asked_precision(args.precision, args.bf16, args.fp16)
    if not can_be_masters(model):
        return _of_other_weights(args, model, asked)
    before, where = recorded
    open_ = asked == "auto" or (asked == "bf16" and before in ("bf16", "autocast"))  # bf16: true once was autocast
    if args.precision == "auto" and before in _WORDS and open_:
        slow = before == "bf16" and not compat.has_fast_bf16(args.device)
        return before, f"as in {where}" + (f"; this {args.device.type} is slow at it" if slow else "")
    if asked != "auto":
        return asked, "" if args.precision != "auto" or asked != "bf16" else "training.bf16"
    fast, kind = compat.has_fast_bf16(args.device), args.device.type
    other = "training.precision: float32 for float32" if fast else "training.precision: bf16 for bf16 all the same"
    return "bf16" if fast else "float32", f"this {kind} {'has' if fast else 'lacks'} fast bf16; {other}"


def _of_other_weights(args: MPOConfig, model: nn.Module, asked: str) -> tuple[str, str]:
    """Return the precision for weights that cannot be masters: as they are, or under autocast."""
    types = {parameter.dtype for parameter in model.parameters()}
    quantised = any(not dtype.is_floating_point for dtype in types)
    weights = "quantised" if quantised else str(max(types - {torch.float32}, key=str)).removeprefix("torch.")
    if args.precision == "bf16" or (args.precision == "float32" and not quantised):
        remedy = (
            "set precision: autocast, or leave it out" if quantised else "set model.dtype: float32, or leave it out"
        )
        raise RecipeError(f"training.precision: {args.precision} needs float32 weights, these are {weights}; {remedy}")
    if asked in ("bf16", "autocast"):
        return "autocast", "" if args.fp16 or asked == "autocast" else f"there are no float32 weights: {weights}"
    return weights, ""


def recorded_precision(folder: str, resume: Any = True) -> tuple[str, str] | None:
    """Return the precision of the run that is gone on with, and the checkpoint or manifest that tells it.

    Args:
        folder: the run folder.
        resume: True for its newest checkpoint, or else its manifest; a checkpoint's name; or None.
    """
    if not resume:
        return None
    for checkpoint in checkpoints_in(folder) if resume is True else [Path(resume)]:
        try:
            found = precision_of(settings_of(checkpoint, read_state(checkpoint)))
        except RunError:
            continue
        return None if found is None else (found, str(checkpoint))
    manifest = Path(folder) / MANIFEST
    try:
        settings: Settings = json.loads(manifest.read_bytes())["settings"]
        found = precision_of(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None if found is None else (found, str(manifest))
