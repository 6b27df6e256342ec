"""Moments at which a run is killed, found by looking at its folder alone."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from tests.torture.scene import STEPS

Moment = Callable[[], bool]
_CLOCK_LAG = 10_000_000  # ns by which the times of files may lag behind the clock


def after(seconds: float) -> Moment:
    """So many seconds after the first look."""
    started: list[float] = []

    def reached() -> bool:
        started.append(time.monotonic()) if not started else None
        return time.monotonic() - started[0] >= seconds

    return reached


def then(first: Moment, second: Moment) -> Moment:
    """``second``, looked for once ``first`` has come."""
    came: list[bool] = []

    def reached() -> bool:
        if not came and first():
            came.append(True)
        return bool(came) and second()

    return reached


def lines_in(file: Path, count: int) -> Moment:
    """A file has so many lines."""

    def reached() -> bool:
        try:
            return file.read_bytes().count(b"\n") >= count
        except OSError:
            return False

    return reached


def bytes_in(folder: Path, count: int) -> Moment:
    """The files below a folder have so many bytes."""
    return lambda: sum(size for _, size, _ in files_below(folder)) >= count


def writing(run: Path, files: int) -> Moment:
    """So many files of checkpoints have been written since the first look: into a hidden folder or in place."""
    since: list[int] = []

    def reached() -> bool:
        since.append(time.time_ns() - _CLOCK_LAG) if not since else None
        written = {name for name, _, changed in checkpoint_files(run) if changed >= since[0]}
        return len(written) >= files

    return reached


def removing(run: Path) -> Moment:
    """A file that a checkpoint had at an earlier look is gone, though not by a new name."""
    seen: set[str] = set()

    def reached() -> bool:
        now = {name for name, _, _ in checkpoint_files(run)}
        gone = bool(seen - now)
        seen.update(now)
        return gone

    return reached


def checkpoint_files(run: Path) -> list[tuple[str, int, int]]:
    """``checkpoint-N/file`` of all checkpoints, also of half-written ones elsewhere in the folder; size; time."""
    found = []
    for name, size, changed in files_below(run):
        at = name.rfind("checkpoint-")
        if at >= 0:
            found.append((name[at:], size, changed))
    return found


def files_below(folder: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of the last change (ns) of every file; what vanishes meanwhile is left out."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            try:
                state = os.stat(path)
            except OSError:
                continue
            found.append((os.path.relpath(path, folder), state.st_size, state.st_mtime_ns))
    return found


def draw(rng: random.Random, run: Path, *, left: int, files: int, limited: bool) -> tuple[str, Moment]:
    """A moment while a run trains, and its description.

    Args:
        rng: draws it.
        run: the run folder.
        left: kills that are still to come after this one; they need steps too.
        files: how many files a checkpoint has; 0: any moment but the writing of a checkpoint.
        limited: whether old checkpoints are removed.
    """
    if files:
        if limited and rng.random() < 0.3:
            return "while a checkpoint is removed", removing(run)
        count = rng.randint(1, files) + (files if rng.random() < 0.4 else 0)
        return f"while a checkpoint is written, file {count}", writing(run, count)
    metrics = run / "metrics.jsonl"
    kind = rng.random()
    if kind < 0.2:
        seconds = rng.uniform(0.0, 1.5)
        return f"after {seconds:.2f} s", after(seconds)
    if kind < 0.35 and not left:
        seconds = rng.uniform(0.0, 0.4)
        return f"{seconds:.2f} s after the last step", then(lines_in(metrics, STEPS), after(seconds))
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    step = rng.randint(1, max(1, (STEPS - min(lines, STEPS - 3)) // (left + 1))) + min(lines, STEPS - 3)
    seconds = rng.uniform(0.0, 0.1)
    return f"{seconds:.2f} s after step {step}", then(lines_in(metrics, step), after(seconds))
