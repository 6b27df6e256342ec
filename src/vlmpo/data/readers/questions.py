"""Files of questions with their answers, JSON Lines: what responses are sampled for, and models tested on."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from vlmpo.data.encode.images import missing_image
from vlmpo.data.fields import image_names, json_kind, json_object, place_images, text_field
from vlmpo.data.records import Question
from vlmpo.errors import DataError, RecordError

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one file, in its order, and the records that are none.

    Attributes:
        questions: all with different ids.
        dropped: one error a record that cannot be used; counted by :meth:`counts`.
    """

    questions: list[Question]
    dropped: list[RecordError]

    def counts(self) -> dict[str, int]:
        """Dropped records by reason, the most frequent first."""
        return dict(Counter(error.reason for error in self.dropped).most_common())


def read_questions(
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    need_answer: bool = True,
) -> QuestionSet:
    """Questions from a JSON Lines file: ``{id?, image (path, list or absent), question, answer, verifier?, split?}``.

    An id is a string or a whole number; without one it is a hash of question, answer and image names. Whether an image
    file exists is looked at, the file is not opened.

    Args:
        path: the file.
        image_root: folder that image names are relative to; default: the file's own.
        split: only the records whose ``split`` says so; the others are passed over.
        need_answer: False where nothing is held against the truth; a missing answer is then "".

    Raises:
        DataError: no such file or folder, no record at all, or none of the asked split.

    Reasons under which records are dropped: ``bad_json``, ``missing_field``, ``placeholder_mismatch``,
    ``missing_image``, ``duplicate_id`` (the second and later records of an id).
    """
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise DataError(f"no such file of questions: {path}")
    root = os.path.abspath(os.path.expanduser(image_root)) if image_root is not None else os.path.dirname(path)
    if not os.path.isdir(root):
        raise DataError(f"{path}: image_root {root} is not a folder")
    found = QuestionSet([], [])
    first_seen: dict[str, str] = {}
    splits: Counter[str] = Counter()
    for origin, line in _lines(path):
        try:
            record = json_object(line, origin)
            splits[str(record.get("split"))] += 1
            if split is not None and record.get("split") != split:
                continue
            question = _question(record, root, origin, need_answer)
            if question.id in first_seen:
                raise _duplicate(question.id, first_seen[question.id], origin)
            first_seen[question.id] = origin
            found.questions.append(question)
        except RecordError as error:
            found.dropped.append(error)
    if split is not None and split not in splits:
        known = ", ".join(f"{name} ({count})" for name, count in splits.most_common(8))
        raise DataError(f"{path}: no record of split {split!r}; there are {known or 'none at all'}")
    if not found.questions and not found.dropped:
        raise DataError(f"{path}: no record in it; write one JSON object a line")
    return found


def _lines(path: str) -> Iterator[tuple[str, bytes]]:
    """``file:line`` and bytes of every line that is not blank."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(_BOM) if number == 1 else line
                if content.strip():
                    yield f"{path}:{number}", content
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _question(record: dict[str, Any], root: str, origin: str, need_answer: bool) -> Question:
    names = image_names(record, origin)
    text = text_field(record, "question", origin)
    if not text.strip():
        raise RecordError("missing_field", origin, "`question` is empty: nothing to answer")
    placed = place_images(text, len(names), origin)
    answer = _answer(record, origin, need_answer)
    images = tuple(os.path.join(root, name) for name in names)
    for image in images:
        if not os.path.isfile(image):
            raise missing_image(image, origin)
    return Question(
        id=_id(record, origin) or _content_hash(placed, answer, names),
        images=images,
        question=placed,
        answer=answer,
        verifier=_optional_text(record, "verifier", origin),
        split=_optional_text(record, "split", origin),
        origin=origin,
    )


def _answer(record: dict[str, Any], origin: str, needed: bool) -> str:
    value = record.get("answer")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)  # 3 and 2.50 are what people write; 2.5 is what JSON makes of the latter
    if value is None and not needed:
        return ""
    answer = text_field(record, "answer", origin)
    if needed and not answer.strip():
        raise RecordError("missing_field", origin, "`answer` is empty: there is nothing to hold a response against")
    return answer


def _optional_text(record: dict[str, Any], key: str, origin: str) -> str | None:
    return None if record.get(key) is None else text_field(record, key, origin)


def _id(record: dict[str, Any], origin: str) -> str | None:
    value = record.get("id")
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        detail = f"`id` must be a string that is not empty or a whole number, not {json_kind(value)}"
        raise RecordError("missing_field", origin, detail)
    return text_field(record, "id", origin)


def _content_hash(question: str, answer: str, images: list[str]) -> str:
    """16 hex digits that depend on the record's own text alone, not on where the data lie."""
    content = json.dumps([question, answer, images], ensure_ascii=True)
    return blake2b(content.encode(), digest_size=8).hexdigest()


def _duplicate(id_: str, first: str, origin: str) -> RecordError:
    detail = f"id {id_!r} was given at {first} already; give every question an id of its own, or none"
    return RecordError("duplicate_id", origin, detail)
