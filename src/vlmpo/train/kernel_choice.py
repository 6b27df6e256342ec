"""Choose the fused kernels of a run: those that are installed, run here, and agree with the plain modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlmpo.errors import first_line
from vlmpo.log import logger
from vlmpo.models.kernel_check import kinds_that_agree
from vlmpo.models.kernels import DTYPES, USED, Functions, Kernels, load_functions, why_absent
from vlmpo.models.masters import HALF

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHOSEN = "chosen.kernels"  # the key in a run's settings; model.kernels is what was asked for


def settle_liger(args: Any) -> None:
    """Take transformers' ``use_liger_kernel`` of an MPOConfig for ``kernels: auto``, and switch it off.

    transformers would patch classes and functions of the whole process, or fail at some models.

    Raises:
        ValueError: it is set where no kernels run, beside ``kernels: off``, or with settings of its own.
    """
    if args.liger_kernel_config:
        raise ValueError(
            "liger_kernel_config is not read: vlmpo uses liger-kernel's norms and gated MLPs wherever they agree with "
            "the model's own, and its head makes no logits that a fused loss could save; leave it out "
            "(model.kernels: off uses none)"
        )
    if not args.use_liger_kernel:
        return
    if args.kernels == "off":
        raise ValueError("use_liger_kernel: true contradicts model.kernels: off; set one of them")
    if reason := why_unusable(args.device):
        raise ValueError(
            f"use_liger_kernel: true, but {reason}; leave it out (model.kernels: auto uses fused kernels wherever "
            "they can be)"
        )
    args.use_liger_kernel = False


def why_unusable(device: torch.device) -> str | None:
    """Return why no fused kernels can run on ``device``; None if they might."""
    if device.type != "cuda":
        return f"fused kernels need a CUDA device, and the run is on {device.type}"
    return why_absent()


def choose_kernels(
    args: Any, policy: Any, reference: Any | None, gather: Callable[[Any], list[Any]], *, rounded: bool
) -> Kernels:
    """Return the kernels of a run, bound to its policy; log which, and why others are not.

    Args:
        args: MPOConfig of the run.
        policy: the model that trains.
        reference: a second model in memory; None: it is a copy of the policy, or there is none.
        gather: returns the object that each rank gives; ranks use the same kernels.
        rounded: whether float32 weights are read in bfloat16, without autocast.
    """
    models = [policy] if reference is None else [policy, reference]
    dtypes = {parameter.dtype for model in models for parameter in model.parameters()} & set(DTYPES)
    if rounded:
        dtypes = {HALF}
    elif args.mixed_precision in _AUTOCAST:
        dtypes.add(_AUTOCAST[args.mixed_precision])
    functions = None if args.kernels == "off" or not dtypes else _functions_for(args.device)
    if functions is None:
        kernels = Kernels()
        kernels.bind(policy)  # an earlier run may have left some
        return kernels
    found = kinds_that_agree(models, USED, functions, device=args.device, dtypes=dtypes)
    kernels = Kernels(_agreed(gather(found)), functions)
    counts = kernels.bind(policy)
    reason = "" if found else f": they know no module of {type(policy).__name__}"
    logger.info(f"kernels: {kernels.describe(counts)}{reason}")
    return kernels


def _agreed(on_ranks: list[dict[str, str | None]]) -> list[str]:
    """Return the kinds that agree on every rank; log the others, with one rank's reason."""
    agreed = []
    for kind in dict.fromkeys(kind for found in on_ranks for kind in found):
        faults = [found.get(kind, "another rank has no such module") for found in on_ranks]
        fault = next(filter(None, faults), None)
        if fault is None:
            agreed.append(kind)
        else:
            logger.info(f"kernels: {kind} is left to the plain modules: {fault}")
    return agreed


def _functions_for(device: torch.device) -> Functions | None:
    """Return the functions for ``device``; None if there are none, which is logged if it is a CUDA device."""
    reason = why_unusable(device)
    try:
        if reason is None:
            return load_functions()
    except Exception as error:  # a foreign package that looks for drivers and compilers
        reason = f"liger-kernel cannot be imported: {type(error).__name__}: {first_line(error)}"
    if device.type == "cuda":
        logger.info(f"kernels: none: {reason}")
    return None
