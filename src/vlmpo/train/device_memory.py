"""Tell what memory a run can still take, and what its steps will take beside their rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_TRIED = 64  # rows and columns of the weight on which an optimizer is tried


def free_bytes(device: torch.device, ranks_here: int = 1) -> int:
    """Return the bytes that this process can still take on ``device``; on a CPU its share of what is free."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return max(min(_available(), _left_of_group()), 0) // ranks_here


def _available() -> int:
    """Return the machine's memory that is free or can be freed; half of all of it if the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_of_group() -> int:
    """Return what is left of the limit that a container sets, if there is one; files in memory can be freed."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        held = int((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        files = next(int(line.split()[1]) for line in lines if line.startswith("file "))
    except (OSError, ValueError, IndexError, StopIteration):  # "max": no limit; or another system
        return 2**62
    return limit - held + files


def in_units(size: int) -> str:
    """Return a number of bytes in GiB, or in MiB if it is small."""
    return f"{size / 1024**3:.1f} GiB" if size >= 1024**3 / 10 else f"{size / 1024**2:.1f} MiB"


def pending_bytes(model: nn.Module, optimizer: Any) -> int:
    """Return what a step takes beside its rows and has not been allocated yet: gradients and optimizer states."""
    trained = [_local(parameter) for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(weight.nbytes for weight in trained)
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if inner is None or inner.state:
        return gradients
    rates = {weight.dtype: _state_bytes(inner, weight) for weight in {w.dtype: w for w in trained}.values()}
    return gradients + int(sum(rates[weight.dtype] * weight.numel() for weight in trained))


def _local(parameter: Any) -> Tensor:
    """Return a weight, or this rank's shard of it."""
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local


def _state_bytes(optimizer: Any, weight: Tensor) -> float:
    """Return the bytes of ``optimizer``'s states for each entry of a weight: tried on a small one."""
    tried = nn.Parameter(torch.zeros(_TRIED, _TRIED, dtype=weight.dtype, device=weight.device))
    tried.grad = torch.zeros_like(tried)
    try:
        other = type(optimizer)([tried], **optimizer.defaults)
        other.step()
        states = [value for value in other.state[tried].values() if isinstance(value, Tensor) and value.dim()]
        return sum(state.nbytes for state in states) / tried.numel()
    except Exception:  # an optimizer that cannot be made so: as much as AdamW's
        return 2.0 * max(weight.itemsize, 2)
