"""End a command by SIGTERM or Ctrl-C: at once, or in training after the step under way and a checkpoint.

:func:`watching` installs the handlers, for the command line. Until then a library keeps Python's own: KeyboardInterrupt
on Ctrl-C, and death by SIGTERM.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT = 2.0  # seconds: launchers and shells send a signal twice; what comes later is a second one
_GRACE = 3.0  # seconds for the main thread to end by itself; it may be blocked in a library that runs no handler


class Interrupted(SystemExit):
    """Ends the process by a signal: without a traceback, with the exit code a shell gives to it (143, 130).

    Args:
        signum: the signal.
        step: the optimizer step after which training ended with a checkpoint; None: it ended at once.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.step = step

    @property
    def signal_name(self) -> str:
        """The signal's name, e.g. SIGTERM."""
        return signal.Signals(self.signum).name

    def __str__(self) -> str:
        return f"interrupted by {self.signal_name}"


class _Watch:
    """Holds what has been received. The main thread runs the handler, a thread of its own reads arrivals.

    The thread is needed because Python runs handlers between bytecodes only: a main thread that waits for another rank
    in a collective, or for a server, would never get there.
    """

    def __init__(self) -> None:
        self.signum = 0  # the first signal
        self.deferring = False
        self.raised = False
        self.owner = os.getpid()
        self._first = 0.0
        self._deadline: float | None = None
        self.final = False  # a checkpoint is written: nothing cuts the last lines short
        self._reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.thread = threading.Thread(target=self._enforce, name="vlmpo-signals", daemon=True)

    def handle(self, signum: int, _frame: object) -> None:
        """Raise Interrupted in the main thread, unless a step is to be finished first."""
        self.signum = self.signum or signum
        if not self.deferring:
            self.stop()

    def stop(self, step: int | None = None) -> None:
        """Raise Interrupted, once; the thread ends the process if that takes too long."""
        if self.raised:
            return
        self.raised, self.final = True, step is not None
        self._deadline = time.monotonic() + (3 * _GRACE if self.final else _GRACE)
        with contextlib.suppress(OSError):
            os.write(self.writer, bytes([signal.SIGCHLD]))  # wakes the thread, which does not know the deadline yet
        raise Interrupted(self.signum, step)

    def close(self) -> None:
        """End the thread."""
        os.write(self.writer, b"\0")
        self.thread.join()
        os.close(self._reader)
        os.close(self.writer)

    def _enforce(self) -> None:
        while True:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            if not select.select([self._reader], [], [], left)[0]:
                self._end()
            for number in os.read(self._reader, 512):
                if number == 0:
                    return
                if number in SIGNALS:
                    self._arrived(number)

    def _arrived(self, number: int) -> None:
        now = time.monotonic()
        if not self._first:
            self._first = now
            self.signum = self.signum or number
            if self.deferring:
                name = signal.Signals(number).name
                _say(f"{name}: the step is finished and a checkpoint written; a second {name} ends the run at once")
            else:
                self._deadline = self._deadline or now + _GRACE
        elif now - self._first >= REPEAT and not self.final:
            self._end()

    def _end(self) -> None:
        """End the process from this thread, with its children: an orphaned worker would wait for ever."""
        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.kill()
        if not self.final:
            _say(f"interrupted by {signal.Signals(self.signum).name}: ended at once")
        os._exit(128 + self.signum)


_watch: _Watch | None = None


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into :class:`Interrupted` in the body.

    A second signal, more than two seconds after the first, ends the process wherever it is. Handlers can be installed
    in the main thread only; in another one, and within another ``watching``, this does nothing.
    """
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _watch = _Watch()
    watch.thread.start()
    before = {number: signal.signal(number, watch.handle) for number in SIGNALS}
    fd = signal.set_wakeup_fd(watch.writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if os.getpid() == watch.owner:  # a forked child has its own handlers by now
            signal.set_wakeup_fd(fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            watch.close()
            _watch = None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let a first signal only set :func:`requested` in the body, which must look and call :func:`stop`.

    A signal that the body has not acted on ends the process when the body is over.
    """
    with _deferring(True):
        yield


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Let a signal end the body at once, also within :func:`deferred`."""
    with _deferring(False):
        yield


@contextlib.contextmanager
def _deferring(value: bool) -> Iterator[None]:
    watch = _watch
    if watch is None:
        yield
        return
    before, watch.deferring = watch.deferring, value
    try:
        if not value and watch.signum:
            watch.stop()
        yield
    finally:
        watch.deferring = before
    if not before and watch.signum:
        watch.stop()


def requested() -> int:
    """Return the signal that has come, 0 if none has."""
    return 0 if _watch is None else _watch.signum


def swallowed() -> int:
    """Return the signal that :class:`Interrupted` was raised for at once, 0 if none: an error after it is its trace."""
    return _watch.signum if _watch is not None and _watch.raised and not _watch.final else 0


def stop(signum: int, step: int) -> None:
    """Raise Interrupted after ``step``, whose checkpoint is written; ``signum`` may have come to another rank alone."""
    if _watch is None:
        raise Interrupted(signum, step)
    _watch.signum = _watch.signum or signum
    _watch.stop(step)


def ignore_signals() -> None:
    """Ignore SIGTERM and Ctrl-C from now on, in the main thread."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def ignore_in_worker(_worker: int = 0) -> None:
    """Leave signals to the main process, for a loader's workers: a terminal and Slurm send them to these too.

    Without its workers the main process could not finish its step. What the main process itself sends ends a worker.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _in_child() -> None:
    """Give a forked child none of this: no bytes of its signals in our pipe, and no second message on Ctrl-C."""
    global _watch
    if _watch is not None:
        _watch = None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _say(line: str) -> None:
    """Write one line to stderr, on the first rank; not by Python's streams, which the main thread may be within."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


os.register_at_fork(after_in_child=_in_child)
