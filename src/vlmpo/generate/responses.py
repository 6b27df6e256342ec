"""The file of sampled responses: only ever appended to, in whole questions, so that a killed run can go on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vlmpo.data.records import Response
from vlmpo.errors import DataError, RunError

RESPONSES_FILE = "responses.jsonl"
PROMPT_HASH = "prompt_hash"  # the one setting that differs from question to question
# Where the recipe has what a response was sampled with; the other settings are keys of `build`.
_RECIPE_KEYS = {"model": "model.path or build.model", "max_tiles": "data.max_tiles", "dtype": "model.dtype"}


def read_responses(path: str | os.PathLike[str]) -> list[Response]:
    """Every response of a file, in its order; a last line that was cut off by a kill is left out.

    Raises:
        DataError: no such file, or a line that is no response.
    """
    try:
        with open(path, "rb") as file:
            return [response for _, response in _parsed(Path(path), file.read())]
    except OSError as error:
        raise DataError(f"no responses can be read from {path} ({error.strerror}); run vlmpo sample first") from error


def _parsed(path: Path, content: bytes) -> Iterator[tuple[int, Response]]:
    """Line number and response of every whole line."""
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            yield number, Response.from_json(json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a response ({error}); take the line out") from error


class ResponseFile:
    """Responses on disk, and which are there already. One process at a time may have it open.

    Args:
        path: the file; it is created where it does not exist, and freed of a last line that was cut off.
        model: who answers now.
        settings: how it is sampled now.

    Attributes:
        done: the sample indices that are there, by question id.
        prompt_hashes: of each question's prompt, when its responses were sampled.
        repaired: bytes of a line cut off by a kill that were taken off the end.

    Raises:
        RunError: another process has the file, it holds a response twice, or responses that were sampled otherwise.
        DataError: a line of it is no response.
    """

    def __init__(self, path: Path, model: str, settings: dict[str, Any]) -> None:
        self.path = path
        self.done: dict[str, set[int]] = {}
        self.prompt_hashes: dict[str, str | None] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - held open, and locked, until close()
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another vlmpo sample is writing to {path}; wait for it or stop it") from None
            self._file.seek(0)
            content = self._file.read()
            self.repaired = len(content) - (content.rfind(b"\n") + 1)
            if self.repaired:
                self._file.truncate(len(content) - self.repaired)
            for number, response in _parsed(path, content):
                self._check(f"{path}:{number}", response, model, settings)
                self._note(f"{path}:{number}", response)
        except BaseException:
            self._file.close()
            raise

    def _check(self, where: str, response: Response, model: str, settings: dict[str, Any]) -> None:
        now = {"model": model, **settings}
        then = {"model": response.model, **response.settings}
        then.pop(PROMPT_HASH, None)
        for key in {**now, **then}:
            if now.get(key) != then.get(key):
                raise RunError(
                    f"{where} was sampled with {_RECIPE_KEYS.get(key, f'build.{key}')} {then.get(key)!r}, now it is "
                    f"{now.get(key)!r}; take the old value to go on, or name another folder in build.output_dir"
                )

    def _note(self, where: str, response: Response) -> None:
        indices = self.done.setdefault(response.question_id, set())
        if response.sample_index in indices:
            raise RunError(
                f"{where}: response {response.sample_index} to question {response.question_id!r} is there twice; "
                "take one of the lines out"
            )
        indices.add(response.sample_index)
        self.prompt_hashes[response.question_id] = response.settings.get(PROMPT_HASH)

    def append(self, responses: Sequence[Response]) -> None:
        """Write responses that are not there yet; they are on disk when this returns."""
        new = [r for r in responses if r.sample_index not in self.done.get(r.question_id, ())]
        lines = [json.dumps(response.to_json(), ensure_ascii=False) + "\n" for response in new]
        # Half of a surrogate pair, which a server's JSON may hold, has no UTF-8.
        self._file.write("".join(lines).encode("utf-8", "replace"))
        self._file.flush()
        os.fsync(self._file.fileno())
        for response in new:
            self._note(str(self.path), response)

    def __enter__(self) -> ResponseFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
