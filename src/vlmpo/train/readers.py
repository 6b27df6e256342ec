"""Decide how many processes read data for a rank, and say what it means if one of them ends."""

from __future__ import annotations

import os
import re

from vlmpo.errors import first_line

MOST = 8  # of a rank: each holds batches ahead, and more were never waited for less
FEW_PAIRS = 64  # are read sooner than processes start


def cores_of_a_rank() -> int:
    """Return the cores that this process may use, shared with the other ranks on this machine; at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, usable // max(1, int(ranks) if ranks.isdecimal() else 1))


def choose_readers(num_pairs: int, device_type: str, cores: int) -> int:
    """Return the default of ``dataloader_num_workers``; 0 reads in the training process itself.

    Args:
        num_pairs: of the training data.
        device_type: where the model runs; on a CPU its threads use all cores themselves.
        cores: of this rank; one is left to the training process.
    """
    if device_type == "cpu" or cores <= 2 or num_pairs < FEW_PAIRS:
        return 0
    return min(MOST, cores - 1)


# By the handler of a dead child, or where a batch is waited for; torch has no kind of error for either.
_ENDED = re.compile(r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)")


def ended_reader(error: BaseException) -> str | None:
    """Return what to say if ``error`` tells that a process which reads data was killed; None if it is another."""
    if not isinstance(error, RuntimeError) or not _ENDED.match(str(error)):
        return None
    reason = first_line(error).rstrip(". ")
    return (
        f"a process that reads data was killed: {reason}. Mostly the machine's memory was full, or its shared memory "
        "(/dev/shm): lower training.dataloader_num_workers, training.dataloader_prefetch_factor or "
        "data.max_tiles. training.resume_from_checkpoint: true goes on from the last checkpoint"
    )
