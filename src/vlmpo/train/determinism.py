"""Make runs with one seed equal to the bit on a GPU too: ``training.deterministic``.

Between hidden states and loss nothing depends on the order of threads anyway (:mod:`vlmpo.tree.ordered`). What is left
are gradients of attention, convolutions and the like, which have a slower kernel that adds in one order. torch takes it
if its switch is on, and refuses an operation that has none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.backends import cudnn

from vlmpo.errors import RunError
from vlmpo.log import logger

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # read once, when cuBLAS is first used; torch's switch insists on it
_WORKSPACES = (":4096:8", ":16:8")  # those with which cuBLAS adds in one order
_FLASH = "FLASH_ATTENTION_DETERMINISTIC"  # transformers reads it whenever it calls the flash-attn package
_REFUSAL = re.compile(r"(\S.*?) does not have a deterministic implementation")
_CUBLAS_REFUSAL = "not deterministic because it uses CuBLAS"


def prepare_determinism(deterministic: bool, full_determinism: bool) -> None:
    """Set what must be set before CUDA is used, if a run is to be ``deterministic``.

    Args:
        deterministic: the setting of that name.
        full_determinism: transformers' own.

    Raises:
        ValueError: both are on; or cuBLAS is set up, or may be, to add in any order.
    """
    slow = "full_determinism waits for the GPU after every launch (CUDA_LAUNCH_BLOCKING=1)"
    if full_determinism and not deterministic:
        logger.info(f"note: training.{slow}; training.deterministic: true is equal to the bit without that")
    if not deterministic:
        return
    if full_determinism:
        raise ValueError(f"{slow}, which deterministic does without; leave full_determinism out")
    found = os.environ.get(WORKSPACE)
    if found in _WORKSPACES:
        return
    choice = " or ".join(_WORKSPACES)
    if found:
        raise ValueError(
            f"deterministic needs the environment variable {WORKSPACE} to be {choice}, and it is {found!r}; unset it"
        )
    if torch.cuda.is_initialized():
        raise ValueError(
            f"deterministic needs {WORKSPACE} in the environment before CUDA is first used, and this process has used "
            f"it already; set {WORKSPACE}={_WORKSPACES[0]} before Python starts, or make the MPOConfig before anything "
            "is put on a GPU"
        )
    os.environ[WORKSPACE] = _WORKSPACES[0]


@contextmanager
def deterministic_run(asked_for: bool) -> Iterator[None]:
    """Let torch use only kernels that add in one order during a ``with`` block; then all is as it was before.

    Args:
        asked_for: the setting ``deterministic``; if it is off, nothing changes.

    Raises:
        RunError: an operation of the model has no such kernel.
    """
    if not asked_for:
        yield
        return
    switch = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a module with a property
    fill, benchmark, flash = memory.fill_uninitialized_memory, cudnn.benchmark, os.environ.get(_FLASH)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a launch for every new tensor, and none is read
    cudnn.benchmark = False  # timing decides which kernel it takes
    os.environ[_FLASH] = "1"
    try:
        yield
    except RuntimeError as error:
        refused = _refused_operation(error)
        if refused is None:
            raise
        told = RunError(
            f"training.deterministic: {refused} has no deterministic implementation in torch {torch.__version__} for "
            "this device, and the model (or its optimizer) needs it. Set training.deterministic: false: two runs then "
            "differ by rounding in what that operation adds up"
        )
        told.met_by = "rank"
        raise told from error
    finally:
        torch.use_deterministic_algorithms(switch[0], warn_only=switch[1])
        memory.fill_uninitialized_memory = fill
        cudnn.benchmark = benchmark
        if flash is None:
            os.environ.pop(_FLASH, None)
        else:
            os.environ[_FLASH] = flash


def _refused_operation(error: RuntimeError) -> str | None:
    """Return the name of the operation that torch refused under its switch; None if the error is another."""
    if _CUBLAS_REFUSAL in str(error):
        return f"a product by cuBLAS under {WORKSPACE}={os.environ.get(WORKSPACE, '')}"
    found = _REFUSAL.search(str(error))
    return None if found is None else found[1]
