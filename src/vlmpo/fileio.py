"""Write files atomically, JSON without NaN and Infinity; name the folder if the disk does not take them."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlmpo.errors import RunError, VlmpoError

_DISK = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "the quota is used up; free some space there",
    errno.EFBIG: "a limit on the size of files (ulimit -f) or the file system forbids it",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EIO: "the disk or its connection fails",
    errno.ESTALE: "the network file system has lost it",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of its path is a file",
    errno.EISDIR: "there is a folder of that name",
    errno.ELOOP: "its links go round in circles",
    errno.EMFILE: "too many files are open (ulimit -n)",
}
# Rust's and torch's writers raise errors of their own kinds; Rust's name the number of the system's error.
_RUST = re.compile(r"\(os error (\d+)\)")
_TORCH = re.compile(r"PytorchStreamWriter failed writing|file write failed|unexpected pos \d+ vs|PyTorchFileWriter")


def disk_problem(error: BaseException) -> str | None:
    """Return what a disk that is full, read-only or gone did to a write, and the remedy; None for another error.

    ``torch.save``, safetensors and tokenizers report it by errors that are no OSError.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _RUST.search(str(error))):
        number = int(found[1])
    if number is None and isinstance(error, RuntimeError) and _TORCH.search(str(error)):
        return "the file could not be written to its end; is the disk full, or over its quota?"
    if number not in _DISK:
        return None
    return f"{os.strerror(number)}; {_DISK[number]}"


@contextmanager
def writing(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error of the disk in the body into one line.

    Args:
        folder: where the body writes, named if the error names no file.

    Raises:
        RunError: the disk is full, read-only, over its quota or gone.
    """
    try:
        yield
    except VlmpoError:
        raise
    except Exception as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        named = getattr(error, "filename", None)
        place = os.fsdecode(named) if isinstance(named, str | bytes) else os.fspath(folder)
        failure = RunError(f"{place}: {problem}. What was written before is whole")
        failure.met_by = "rank"
        raise failure from error


def replace_text(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` (UTF-8) in one step; see :func:`replace_bytes`."""
    # A lone surrogate has no UTF-8 encoding; JSON writes its escape.
    replace_bytes(path, text.encode("utf-8", "backslashreplace"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Replace the file ``path`` by ``content`` in one step: a kill or a crash leaves the old file or the new one.

    Two processes may write at once: each has its own partial file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            append(file.fileno(), content)
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failing write names no file
        raise


def append(descriptor: int, content: bytes) -> None:
    """Write all of ``content`` to a file descriptor."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make what was created, renamed or removed in ``folder`` survive a crash, if its file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # not for folders
    finally:
        os.close(descriptor)


def dump_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Return ``value`` as JSON that every reader takes: a number that is not finite, which JSON lacks, becomes null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_with_nulls(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_json(path: Path, value: Any) -> None:
    """Replace the file ``path`` by ``value`` as indented JSON; see :func:`replace_text` and :func:`dump_json`."""
    replace_text(path, dump_json(value, indent=1) + "\n")


def replace_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace the file ``path`` by ``records``, one JSON object a line; see :func:`replace_text`."""
    replace_text(path, "".join(dump_json(record) + "\n" for record in records))
