"""Hold a folder for one process at a time, on one host or on several."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmpo.errors import RunError
from vlmpo.fileio import disk_problem

HEARTBEAT = 10.0  # seconds between two signs of life of the process that holds a folder
STALE = 60.0  # seconds without one, after which a process on another host takes it over


@contextlib.contextmanager
def locked(folder: Path, command: str, key: str) -> Iterator[None]:
    """Hold ``folder`` for one process that runs ``command``.

    On one host the system's own lock decides, which ends with its process. On another one the holder must not have
    given a sign of life for a minute: a job that was put on another node starts again then. The lock file's name begins
    with ``_``: such files are not pushed to the Hub.

    Args:
        folder: made if it does not exist.
        command: the name of the lock, e.g. ``train``; locks of other names are independent.
        key: the recipe key that names the folder, for the message.

    Raises:
        RunError: another process holds it, or it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = disk_problem(error) or os.strerror(error.errno or 0)
        raise RunError(f"{key}: the folder {folder} cannot be made: {reason}; name another one") from error
    path = folder / f"_{command}.lock"
    descriptor = _acquire(path, folder, command, key)
    _held.add(descriptor)
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(descriptor, done), name="vlmpo-heartbeat", daemon=True)
    beat.start()
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:
            done.set()
            beat.join()
            with contextlib.suppress(OSError):
                if _is_same(path, descriptor):
                    path.unlink()
            _held.discard(descriptor)
            os.close(descriptor)
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()  # nothing has come into it


def _acquire(path: Path, folder: Path, command: str, key: str) -> int:
    """Return the descriptor of the locked lock file, in which this process is named."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            is_locked = _flock(descriptor)
            if not _is_same(path, descriptor):  # its holder removed it in between
                os.close(descriptor)
                continue
            holder = _read_holder(descriptor)
            elsewhere = holder.get("host") not in (None, socket.gethostname())
            stale = elsewhere and _age(path, descriptor) > STALE
            if (is_locked and not elsewhere) or stale:
                if not is_locked and stale:  # a file server still keeps a dead node's lock
                    path.unlink()
                    os.close(descriptor)
                    continue
                _write_holder(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        raise _in_use(folder, command, key, holder)


def refuse_if_held(folder: Path, command: str, key: str) -> None:
    """Raise RunError if another process holds ``folder`` by :func:`locked`; changes nothing."""
    path = folder / f"_{command}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        is_locked, holder = _flock(descriptor), _read_holder(descriptor)
        elsewhere = holder.get("host") not in (None, socket.gethostname())
        stale = elsewhere and time.time() - os.fstat(descriptor).st_mtime > STALE
    finally:
        os.close(descriptor)
    if not stale and (elsewhere or not is_locked):
        raise _in_use(folder, command, key, holder)


def _in_use(folder: Path, command: str, key: str, holder: dict[str, Any]) -> RunError:
    return RunError(
        f"{folder} is in use by another vlmpo {command} (host {holder.get('host', 'unknown')}, pid "
        f"{holder.get('pid', 'unknown')}, since {holder.get('since', 'just now')}); wait for it, stop it, or name "
        f"another folder in {key}"
    )


def _flock(descriptor: int) -> bool:
    """Return whether nobody else on this host, or on the file server, has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        holder = _read_holder(descriptor)  # a file system without locks: see if that process is alive
        if holder.get("host") != socket.gethostname():
            return True
        return not _is_alive(holder.get("pid"))
    return True


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, TypeError, ValueError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read_holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _write_holder(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _age(path: Path, descriptor: int) -> float:
    """Return the seconds since the holder's last sign of life, by the file server's clock: hosts' clocks differ."""
    probe = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - os.fstat(descriptor).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _beat(descriptor: int, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT):
        with contextlib.suppress(OSError):  # a disk that fails is reported by whatever writes to it next
            os.utime(descriptor)


_held: set[int] = set()


def _close_in_child() -> None:
    """Keep a forked loader worker, which may outlive its main process by seconds, from holding the lock too."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
