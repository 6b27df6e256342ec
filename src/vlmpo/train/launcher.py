"""Notice a launcher whose processes do not see each other: each would train a run of its own into one folder."""

from __future__ import annotations

from collections.abc import Mapping

from vlmpo.errors import RecipeError

# The number of processes, and the variable that numbers them. SLURM_NTASKS is no proof: it is set for every process
# within an allocation. SLURM_STEP_NUM_TASKS is set by srun, for what it has started itself.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


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


def refuse_unseen_ranks(environment: Mapping[str, str], world_size: int) -> None:
    """Raise RecipeError if a launcher started several processes and this one, with ``world_size`` 1, sees no other."""
    variable, processes = started_processes(environment)
    if world_size == 1 and processes > 1:
        raise RecipeError(
            f"{processes} processes were started ({variable}={processes}), but they do not see each other: each would "
            "train a run of its own into one folder. On a CPU set training.use_cpu: true; on GPUs start with torchrun "
            "or accelerate launch; if this is a run by itself, set WORLD_SIZE=1"
        )


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 1
