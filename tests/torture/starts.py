"""Start a command of vlmpo, watch it, kill it: as a process of its own, forked from this one, or as two ranks.

A forked start has all libraries loaded: seconds become tenths. What runs is the same command line.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.paths import REPO

MEMORY = 10 << 30  # bytes of address space of one process: what would take the machine fails instead
PATIENCE = 150.0  # seconds: what takes longer hangs
WAYS = ("forked", "process", "ranks", "torchrun")


@dataclass(frozen=True)
class Start:
    """How a command is started.

    Attributes:
        arguments: what follows ``vlmpo``.
        folder: the working folder, and the place of vlmpo's cache.
        way: ``process``: as a user does; ``forked``: from this process; ``ranks``: two forked ones; ``torchrun``.
        largest_file: bytes a file may have; None sets no limit.
        tmpfs: run in a RAM disk of so many bytes that lies over this folder; its content is copied there and back.
        sharded: give FSDP to a forked rank on the CPU.
    """

    arguments: Sequence[str]
    folder: Path
    way: str = "forked"
    largest_file: int | None = None
    tmpfs: tuple[Path, int] | None = None
    sharded: bool = False

    def shown(self) -> str:
        """The command a user would type."""
        launcher = "torchrun --nproc-per-node 2 -m vlmpo" if self.way in ("ranks", "torchrun") else "vlmpo"
        return " ".join([launcher, *self.arguments])


@dataclass
class Ended:
    """How a start ended.

    Attributes:
        codes: of its processes: negative for a signal.
        output: stdout and stderr of all of them.
        killed: whether it was killed by us, at the moment asked for.
        hung: it had to be killed because it took too long.
    """

    codes: list[int]
    output: str
    killed: bool
    seconds: float
    hung: bool = False

    @property
    def code(self) -> int:
        """The code of the first process that was not killed by us; else that of the first."""
        return next((code for code in self.codes if code != -signal.SIGKILL), self.codes[0])

    def faults(self) -> list[str]:
        """What no end may look like, whatever happened before: a traceback, a hang, an unknown code, many messages."""
        found = []
        if self.hung:
            found.append(f"hangs: nothing after {PATIENCE:.0f} s")
        else:
            # Of a launcher that lost a rank the code is its own; ranks that were not killed answer for theirs.
            codes = self.codes if not self.killed or len(self.codes) > 1 else []
            known = (0, 2, -signal.SIGKILL) if self.killed else (0, 2)
            found += [f"exit {code}" for code in dict.fromkeys(codes) if code not in known]
        if tracebacks := self.tracebacks():
            found.append(f"traceback: {tracebacks[0]}")
        if len(self.messages()) > 1:
            found.append(f"{len(self.messages())} messages instead of one")
        return found

    def lines(self) -> list[str]:
        """The lines that were printed; a progress bar's states count as lines."""
        return [line for line in self.output.replace("\r", "\n").splitlines() if line.strip()]

    def messages(self) -> list[str]:
        return [line for line in self.lines() if line.startswith(("error: ", "error on rank"))]

    def tracebacks(self) -> list[str]:
        """The exceptions whose tracebacks were printed, without torchrun's own, which ends each of its failures."""
        found, inside = [], False
        for line in self.lines():
            line = re.sub(r"^\[rank\d+\]: ?", "", line)
            if line.startswith("Traceback (most recent call last)"):
                inside = True
            elif inside and not line.startswith(" "):
                inside = False
                found.append(line[:200])
        return [line for line in found if not line.startswith("torch.distributed.elastic.")]

    def last_line(self) -> str:
        """The message, the exception, or the last line that was printed; shortened."""
        return (self.messages() or self.tracebacks() or self.lines() or ["no output"])[-1][:200]


@dataclass
class _Running:
    pids: list[int]
    pipe: int
    popen: subprocess.Popen[bytes] | None = None
    codes: dict[int, int] = field(default_factory=dict)
    output: bytearray = field(default_factory=bytearray)

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.pipe, 1 << 16):
                self.output += piece

    def is_over(self) -> bool:
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """SIGKILL all, or only the processes of these numbers."""
        victims = self.pids if ranks is None else [self.pids[rank] for rank in ranks]
        if self.popen is not None:
            children = descendants(self.pids[0])  # torchrun's ranks; a lone process' loader workers
            chosen = [child for child in children if _rank_of(child) in map(str, ranks or ())]
            victims = [*self.pids, *children] if ranks is None else chosen
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def run(start: Start, moment: Callable[[], bool] | None = None, ranks: Sequence[int] | None = None) -> Ended:
    """Run a command to its end, or kill it once ``moment`` is true: all of it, or only these of its ranks."""
    started = time.monotonic()
    running = _launch(start)
    killed = hung = False
    try:
        while not running.is_over():
            running.drain()
            if not killed and moment is not None and moment():
                running.kill(ranks)
                killed = True
            if time.monotonic() - started > PATIENCE:
                hung = True
                running.kill()
            time.sleep(0.002)
        running.drain()
    finally:
        os.close(running.pipe)
    codes = [running.codes[pid] for pid in running.pids]
    return Ended(codes, running.output.decode("utf-8", "replace"), killed, time.monotonic() - started, hung)


def _launch(start: Start) -> _Running:
    start.folder.mkdir(parents=True, exist_ok=True)
    read, write = os.pipe()
    os.set_blocking(read, False)
    try:
        if start.way in ("forked", "ranks"):
            port, count = _free_port(), 2 if start.way == "ranks" else 1
            return _Running([_fork(start, write, rank, count, port) for rank in range(count)], read)
        popen = subprocess.Popen(
            _command(start),
            cwd=start.folder,
            env=_environment(start),
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=write,
            preexec_fn=lambda: _limit(start),
            start_new_session=True,
        )
        return _Running([popen.pid], read, popen)
    finally:
        os.close(write)


def _command(start: Start) -> list[str]:
    python = [sys.executable, "-m"]
    if start.way == "torchrun":
        python += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*python, "vlmpo", *start.arguments]
    if start.tmpfs is None:
        return command
    over, size = start.tmpfs
    stash = over.with_name(f"{over.name}.stash")
    script = (
        f'mkdir -p "{over}" "{stash}" && mount -t tmpfs -o size={size} tmpfs "{over}" && cp -a "{stash}/." "{over}" '
        f'&& "$@"; code=$?; cp -a "{over}/." "{stash}"; exit $code'
    )
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command]


def can_mount() -> bool:
    """Whether a RAM disk can be mounted here, in a mount namespace."""
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _environment(start: Start) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "VLMPO_CACHE": str(start.folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, "PYTHONPATH": f"{REPO / 'src'}{os.pathsep}{REPO}"}


def _limit(start: Start) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if start.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (start.largest_file, start.largest_file))


def fork(task: Callable[[], int | None]) -> int:
    """Return the number of a forked process that does ``task`` and exits with the code it returns, None for 0."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = task() or 0
    except BaseException:  # DCP's CheckpointException is no Exception
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError


def _fork(start: Start, pipe: int, rank: int, count: int, port: int) -> int:
    def task() -> int:
        _limit(start)
        os.environ.update(_environment(start))
        if count > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        null = os.open(os.devnull, os.O_RDONLY)
        for descriptor, source in ((0, null), (1, pipe), (2, pipe)):
            os.dup2(source, descriptor)
        os.chdir(start.folder)
        return _call(start)

    return fork(task)


def _call(start: Start) -> int:
    """Do what ``python -m vlmpo`` does; the code it would exit with."""
    import torch

    from vlmpo.cli import main

    gc.enable()
    torch.set_num_threads(1)
    if start.sharded:
        from tests.ranks import sharded_on_cpu

        sharded_on_cpu()
    sys.argv = ["vlmpo", *start.arguments]
    try:
        main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def load_libraries() -> None:
    """Import what commands import, so that forked starts have it. Computes nothing: threads survive no fork."""
    import peft  # noqa: F401

    import tests.ranks
    import tests.tiny_models  # noqa: F401
    import vlmpo.commands.pair
    import vlmpo.commands.sample
    import vlmpo.commands.train  # noqa: F401


def descendants(pid: int) -> list[int]:
    """The processes below ``pid``, from /proc."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def _rank_of(pid: int) -> str | None:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((entry[5:].decode() for entry in entries if entry.startswith(b"RANK=")), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
