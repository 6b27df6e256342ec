"""Keeps generated responses in a file, whole questions at a time, so that a killed run can continue."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from vlmpo.data.readers.json import decode_json
from vlmpo.data.records import MAX_LINE_BYTES, Response, checked_text, json_kind
from vlmpo.errors import DataError, RecordError, RunError, shorten
from vlmpo.fileio import append
from vlmpo.generate.base import Generated

RESPONSES_FILE = "responses.jsonl"
PROMPT_HASH = "prompt_hash"  # the one setting that differs from question to question
IN_THOUGHT = "in_thought"  # stored with a response that is all thought; see Generated
_MAX_SAMPLES = 1 << 31
# Recipe keys of what a response was generated with; every other setting is a key of `build`.
_RECIPE_KEYS = {"model": "model.path or build.model", "max_tiles": "data.max_tiles", "dtype": "model.dtype"}


def read_responses(path: str | os.PathLike[str]) -> list[Response]:
    """Read every response of a file, in its order; a last line that a kill cut off is left out.

    Raises:
        DataError: the file does not exist, or a line is not a response.
    """
    _refuse_special(path)
    try:
        with open(path, "rb") as file:
            return [response for _, response, _ in _parse(Path(path), file)]
    except OSError as error:
        raise DataError(f"cannot read responses from {path} ({error.strerror}); run vlmpo sample first") from error


def _refuse_special(path: str | os.PathLike[str]) -> None:
    """Raise DataError for a pipe, a device or a folder: the first two would be waited for."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path} is not a regular file; name another folder in build.output_dir")


def _parse(path: Path, file: BinaryIO) -> Iterator[tuple[str, Response, int]]:
    """Yield ``file:line``, the response and the length in bytes of every whole line."""
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_BYTES + 1)
        origin = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{origin}: not a response (more than {MAX_LINE_BYTES >> 20} MiB); remove the line")
        if not line.endswith(b"\n"):
            return
        try:
            response = _checked(decode_json(line[:-1].decode("utf-8")), origin)
        except (ValueError, RecursionError) as error:
            detail = error.detail if isinstance(error, RecordError) else shorten(error)
            raise DataError(f"{origin}: not a response ({detail}); remove the line") from error
        yield origin, response, len(line)


_KINDS: dict[str, type] = {field.name: str for field in fields(Response)} | {"sample_index": int, "settings": dict}


def _checked(record: Any, origin: str) -> Response:
    """Return the response that a line holds. Raises ValueError, which may be a RecordError, if it holds none."""
    if not isinstance(record, dict):
        raise ValueError(f"it holds {json_kind(record)}")
    for key, kind in _KINDS.items():
        value = record.get(key, {} if key == "settings" else None)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"`{key}` is {json_kind(value) if key in record else 'missing'}")
        if isinstance(value, str):
            checked_text(value, key, origin)
    if unknown := record.keys() - _KINDS.keys():
        raise ValueError(f"`{shorten(min(unknown))}` is not a key of a response")
    if not 0 <= record["sample_index"] < _MAX_SAMPLES:
        raise ValueError("`sample_index` is not the number of a sample")
    return Response.from_json(record)


@contextmanager
def open_responses(path: Path, model: str, settings: dict[str, Any]) -> Iterator[ResponseFile]:
    """Open a file of responses to append to. It is locked meanwhile: one process at a time may write to it.

    Args:
        path: the file. It is created if it does not exist; a last line that a kill cut off is removed.
        model: the model that answers now.
        settings: how it is sampled now.

    Raises:
        RunError: another process has the file open, the file contains a response twice, or its responses were
            generated with another model or other settings.
        DataError: a line is not a response.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_special(path)
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another vlmpo sample is writing to {path}; wait for it or stop it") from None
        yield ResponseFile(path, file, model, settings)


class ResponseFile:
    """Appends to a file of responses that :func:`open_responses` opened.

    Attributes:
        done: the sample indices in the file, by question id.
        prompt_hashes: hash of the prompt that the responses to a question answer, by question id.
        repaired: bytes removed because a kill had cut off their line.
    """

    def __init__(self, path: Path, file: FileIO, model: str, settings: dict[str, Any]) -> None:
        self.path = path
        self.model = model
        self.settings = settings
        self.done: dict[str, set[int]] = {}
        self.prompt_hashes: dict[str, str | None] = {}
        self._file = file
        whole = 0  # bytes of whole lines
        with open(path, "rb") as content:  # `file` has no buffer
            for origin, response, length in _parse(path, content):
                self._check_settings(origin, response)
                self._note(origin, response)
                whole += length
        self.repaired = file.seek(0, os.SEEK_END) - whole
        if self.repaired:
            file.truncate(whole)

    def _check_settings(self, origin: str, response: Response) -> None:
        now = {"model": self.model, **self.settings}
        then = {"model": response.model, **response.settings}
        for of_one_response in (PROMPT_HASH, IN_THOUGHT):
            then.pop(of_one_response, None)
        for key in {**now, **then}:
            if now.get(key) != then.get(key):
                name = _RECIPE_KEYS.get(key, f"build.{shorten(key)}")
                before, after = (
                    shorten(repr(settings.get(key)), 500) for settings in (then, now)
                )  # a template is long
                raise RunError(
                    f"{origin} was sampled with {name} {before}, now it is {after}; restore the old value to continue, "
                    "or name another folder in build.output_dir"
                )

    def _note(self, origin: str, response: Response) -> None:
        indices = self.done.setdefault(response.question_id, set())
        if response.sample_index in indices:
            raise RunError(
                f"{origin}: response {response.sample_index} to question {shorten(repr(response.question_id))} appears "
                "twice; remove one of the lines"
            )
        indices.add(response.sample_index)
        self.prompt_hashes[response.question_id] = response.settings.get(PROMPT_HASH)

    def append(self, question_id: str, responses: Sequence[Generated], prompt_hash: str | None = None) -> int:
        """Write the samples of one question that are not in the file yet, and return their number.

        They are on disk when this returns.

        Args:
            question_id: the question.
            responses: all its samples, in order of their index.
            prompt_hash: hash of its prompt, stored among the settings.
        """
        settings = self.settings if prompt_hash is None else {**self.settings, PROMPT_HASH: prompt_hash}
        with_thought = {**settings, IN_THOUGHT: True}
        known = self.done.get(question_id, set())
        new = [
            Response(
                question_id,
                index,
                response.text,
                response.finish_reason,
                self.model,
                with_thought if response.in_thought else settings,
            )
            for index, response in enumerate(responses)
            if index not in known
        ]
        lines = [json.dumps(response.to_json(), ensure_ascii=False) + "\n" for response in new]
        # A server's JSON may contain half of a surrogate pair, which has no UTF-8 encoding.
        content = "".join(lines).encode("utf-8", "replace")
        size = os.fstat(self._file.fileno()).st_size
        try:
            append(self._file.fileno(), content)
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size)  # whole questions only, also on a disk that is full
            error.filename = str(self.path)
            raise
        for response in new:
            self._note(str(self.path), response)
        return len(new)
