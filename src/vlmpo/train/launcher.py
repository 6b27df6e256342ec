"""Notice what a launcher started: processes that meet on the CPU, and those that do not see each other.

Each of the latter would train a run of its own into one folder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vlmpo.errors import RecipeError

# The number of processes, and the variable that numbers them. SLURM_NTASKS is no proof: it is set for every process
# within an allocation. SLURM_STEP_NUM_TASKS is set by srun, for what it has started itself.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")  # that accelerate reads beside RANK


def started_processes(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return how many processes the launcher started, and the variable that says so; 1 and "" without a launcher.

    ``WORLD_SIZE``, if it is set, decides alone: torchrun within a Slurm step has processes of its own.
    """
    if "WORLD_SIZE" in environment:
        return "WORLD_SIZE", _number(environment["WORLD_SIZE"])
    for size, rank in _LAUNCHERS:
        if rank in environment and _number(environment.get(size, "")) > 1:
            return size, _number(environment[size])
    return "", 1


def only_cpu(environment: Mapping[str, str]) -> bool:
    """Return whether the CPU is all there is to train on, as if ``use_cpu`` were set.

    Not if DeepSpeed chooses the device by itself, nor for processes without a place to meet: accelerate would wait for
    the others, or find no address.
    """
    if torch.accelerator.is_available() or environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return False
    if started_processes(environment)[1] > 1:
        return "MASTER_ADDR" in environment and any(name in environment for name in ("RANK", *_RANKS))
    # accelerate takes a launcher's number for its own, though WORLD_SIZE says that this process is by itself
    return not any(_number(environment.get(size, "")) > 1 for size, _ in _LAUNCHERS)


def refuse_unseen_ranks(environment: Mapping[str, str], world_size: int) -> None:
    """Raise RecipeError if a launcher started several processes and this one, with ``world_size`` 1, sees no other."""
    variable, processes = started_processes(environment)
    if world_size == 1 and processes > 1:
        raise RecipeError(
            f"{processes} processes were started ({variable}={processes}), but they do not see each other: each would "
            "train a run of its own into one folder. Start with torchrun or accelerate launch, or set RANK, WORLD_SIZE "
            "and MASTER_ADDR (on the CPU of a machine with GPUs training.use_cpu: true too); if this is a run by "
            "itself, set WORLD_SIZE=1"
        )


def one_of_several(environment: Mapping[str, str]) -> str | None:
    """Return a remark if accelerate launch was asked for several processes and started one, as it does on a CPU."""
    launched, ranked = "ACCELERATE_MIXED_PRECISION" in environment, {"RANK", "WORLD_SIZE"} & set(environment)
    if not launched or ranked or "MASTER_ADDR" not in environment:  # accelerate sets it for several
        return None
    return (
        "accelerate launch started one process; if it was to be more add --multi_gpu (without --cpu), or use torchrun"
    )


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 1
