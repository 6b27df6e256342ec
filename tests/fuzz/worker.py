"""One worker: reads its share of the inputs of each reader, and says what went wrong, as JSON lines on stdout.

``python -m tests.fuzz.worker '{"readers": [...], "seed": 0, "count": N, "share": K, "shares": N, "from": I, ...}'``.
Where it is stands in a file that outlives it: a worker that dies has met a fault too.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.readers import READERS, make_input, prepare
from tests.fuzz.shrink import shrink
from vlmpo.errors import VlmpoError

SLOW = 1.0  # seconds an input may take
BUSY = 5.0  # times as long it may take by the clock: other processes want the cores too
MEMORY = 500 << 20  # bytes of address space that an input may take
REST = 500  # inputs, after which what the worker itself has taken is left out of account again
_HANGS = 8.0  # CPU seconds, after which an input is interrupted
POSITION = struct.Struct("<ii")  # number of the reader, number of the input
_SHOWN = 600  # characters of an example


class Interrupted(BaseException):
    """An input has taken too long; nothing under test catches it."""


@dataclass
class Tally:
    """What one worker found of one reader."""

    reader: str
    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)


def main() -> None:
    """Read this worker's share."""
    task = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=task["folder"]) as folder, open(task["position"], "r+b") as file:
        os.chdir(folder)
        prepare(Path(folder))
        position = mmap.mmap(file.fileno(), POSITION.size)
        signal.signal(signal.SIGVTALRM, _interrupt)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        first = task["from"]
        for number, reader in enumerate(READERS):
            if reader in task["readers"]:
                _read_share(reader, number, task, first, position)
                first = task["share"]
    _say({"done": True})


def _read_share(reader: str, number: int, task: dict[str, Any], first: int, position: mmap.mmap) -> None:
    tally = Tally(reader)
    for index in range(first, task["count"], task["shares"]):
        if index // task["shares"] % REST == 0 or index == first:
            _limit_memory()
        position[:] = POSITION.pack(number, index)
        case = make_input(reader, task["seed"], index)
        seconds, fault, refused = attempt(reader, case)
        tally.inputs += 1
        tally.refused += refused
        tally.slowest = max(tally.slowest, seconds)
        if fault is not None:
            _note(tally, fault, case, index)
        if index // task["shares"] % 2000 == 1999:
            _tell(tally)
            tally = Tally(reader)
    _tell(tally)


def attempt(reader: str, case: Any) -> tuple[float, tuple[str, str] | None, bool]:
    """Read an input; seconds of work, fault as (what and where, message), and whether it was refused, as it may be."""
    seconds, fault, refused = _once(reader, case)
    for _ in range(2):  # a busy machine makes anything slow once
        if fault is None and seconds > SLOW:
            seconds = min(seconds, _once(reader, case)[0])
    if fault is None and seconds > SLOW:
        fault = (f"slow: over {SLOW:g} s", f"{seconds:.1f} s")
    return seconds, fault, refused


def _once(reader: str, case: Any) -> tuple[float, tuple[str, str] | None, bool]:
    fault, refused = None, False
    started, worked = time.perf_counter(), time.process_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, _HANGS)
    try:
        READERS[reader].read(case, Path())
    except VlmpoError as error:
        refused = True
        if not str(error).strip():
            fault = (f"{type(error).__name__} without a message at {_place(error)}", "")
    except BaseException as error:
        fault = (f"{type(error).__name__} at {_place(error)}", str(error)[:300])
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    seconds = max(time.process_time() - worked, (time.perf_counter() - started) / BUSY)
    return seconds, fault, refused


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise Interrupted(f"over {_HANGS:g} s of CPU")


def _place(error: BaseException) -> str:
    """The innermost line of ours on the way to an exception, or the innermost at all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/vlmpo/" in frame.filename] or frames[-1:]
    frame = ours[-1]
    return f"{frame.filename[frame.filename.rfind('vlmpo/') :]}:{frame.lineno} {frame.name}"


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def _note(tally: Tally, fault: tuple[str, str], case: Any, index: int) -> None:
    """Count a fault; the first of its kind in this tally is made small and told."""
    what, message = fault
    tally.faults[what] = tally.faults.get(what, 0) + 1
    if tally.faults[what] > 1 or what in _told.setdefault(tally.reader, set()):
        return
    _told[tally.reader].add(what)

    def fails(smaller: Any) -> bool:
        again = _once(tally.reader, smaller)[1]
        return again is not None and again[0] == what

    small = case if what.startswith(("slow", "Interrupted", "MemoryError")) else shrink(case, fails)
    _say({"fault": what, "message": message, "reader": tally.reader, "index": index, "example": shown(small)})


_told: dict[str, set[str]] = {}


def shown(case: Any) -> str:
    """An input, shortened in the middle."""
    text = repr(case)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ...{len(text)} characters... {text[-_SHOWN // 4 :]}"


def _tell(tally: Tally) -> None:
    _say(vars(tally))


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
