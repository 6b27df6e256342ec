"""End a command: an error as its message, a signal as how to go on, each with its exit code."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vlmpo.errors import RunError, VlmpoError, first_line
from vlmpo.fileio import disk_problem
from vlmpo.interrupt import Interrupted, swallowed, watching
from vlmpo.log import print_error, shown
from vlmpo.quiet import hold_back_noise


@contextmanager
def exit_codes(go_on: str | None = None) -> Iterator[None]:
    """Turn an exception or a signal into its message and exit code; at the end leave the process group.

    Args:
        go_on: the command by which this one goes on after an interruption, if it can.
    """
    hold_back_noise()
    with watching():  # to the end: a launcher sends signals while messages are printed
        try:
            with _one_line():
                yield
                _leave_process_group(destroy=True)
        except Interrupted as stop:
            _say_how_to_go_on(stop, go_on)
            _leave_process_group(destroy=False)
            raise typer.Exit(128 + stop.signum) from None
        except VlmpoError as error:
            complain(error)
            _leave_process_group(destroy=False)  # other ranks may be within a collective
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # `vlmpo inspect ... | head`: typer closes down quietly
        except Exception:
            sys.stderr.write(shown(traceback.format_exc()))
            raise typer.Exit(1) from None


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn errors of the system, and of a rank that has ended, into errors for the user."""
    try:
        yield
    except Exception as error:
        if signum := swallowed():  # a library caught the interruption in its import, and is half there
            raise Interrupted(signum) from None
        if isinstance(error, VlmpoError | BrokenPipeError) or (found := _for_the_user(error)) is None:
            raise
        raise found from error


def _for_the_user(error: Exception) -> BaseException | None:
    """Return the one line that an error of the system is worth; None for our own fault, which has a traceback."""
    found: RunError | None = None
    if (problem := disk_problem(error)) is not None or isinstance(error, OSError):
        place = getattr(error, "filename", None)
        reason = problem or getattr(error, "strerror", None) or first_line(error)
        found = RunError(f"{os.fsdecode(place)}: {reason}" if isinstance(place, str | bytes) else reason)
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; it is not imported
        found = RunError(f"out of memory ({first_line(error)})")
    elif isinstance(error, RuntimeError) and _is_lost_rank(error):
        found = RunError(
            f"another rank has ended ({first_line(error)[:200]}); its own message says why. No checkpoint was written"
        )
    if found is not None:
        found.met_by = "rank"
    return found


def _is_lost_rank(error: RuntimeError) -> bool:
    """Return whether a collective failed. gloo raises plain RuntimeErrors."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Socket Timeout", "NCCL")
    return type(error).__name__.startswith("Dist") or any(word in str(error) for word in words)


def _say_how_to_go_on(stop: Interrupted, go_on: str | None) -> None:
    if os.environ.get("RANK", "0") != "0":
        _let_first_rank_finish()
        return
    launcher = ", by the launcher that started this run" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    reached = "" if stop.step is None else f" after step {stop.step}, whose checkpoint is written"
    print_error(f"{stop}", f"{reached}; to go on{launcher}: {go_on}" if go_on else reached)


def _let_first_rank_finish() -> None:
    """Wait while the rank that prints does so: the launcher ends the job when the first rank exits."""
    time.sleep(1.0)


def _leave_process_group(*, destroy: bool) -> None:
    """Give gloo's threads time to finish, if there is a process group, and then destroy it if ``destroy`` is set.

    A thread that frees the last collective's tensors while the interpreter shuts down aborts the process: the exit code
    is lost, and the launcher kills the first rank, which may still be writing the model. The thread needs the
    interpreter's lock, and gets it while this one sleeps. (Joining the threads by dropping every reference to the group
    can deadlock: torch holds the lock there.)
    """
    # Nothing is imported here: an import that was interrupted is half there, and fails when it is taken up again.
    distributed = sys.modules.get("torch.distributed") if "torch" in sys.modules else None
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        time.sleep(0.5)
        if destroy:
            distributed.destroy_process_group()


def complain(error: VlmpoError) -> None:
    """Print the error on stderr: once a job, once a node, or on the one rank that met it; see ``VlmpoError.met_by``."""
    rank = os.environ.get("RANK", "0")
    first_of_node = os.environ.get("LOCAL_RANK") == "0"
    if not (rank == "0" or error.met_by == "rank" or (error.met_by == "node" and first_of_node)):
        _let_first_rank_finish()
        return
    print_error("error: " if rank == "0" else f"error on rank {rank}: ", str(error))
