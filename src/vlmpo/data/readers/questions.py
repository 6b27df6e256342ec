"""Read files of questions with their answers, JSON Lines."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from vlmpo.data.encode.images import missing_image
from vlmpo.data.readers.json import JsonRecords
from vlmpo.data.records import IMAGE_PLACEHOLDER, Question, json_kind, text_field
from vlmpo.errors import DataError, RecordError
from vlmpo.hashing import content_hash


@dataclass(frozen=True)
class QuestionSet:
    """Holds the questions of one file, in its order, and the errors of the other records.

    Attributes:
        questions: questions, all with different ids.
        dropped: one error for each record that cannot be used.
    """

    questions: list[Question]
    dropped: list[RecordError]

    def counts(self) -> dict[str, int]:
        """Count the dropped records by reason, the most frequent first."""
        return dict(Counter(error.reason for error in self.dropped).most_common())


def read_questions(
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    need_answer: bool = True,
) -> QuestionSet:
    """Read a JSON Lines file of ``{id?, image (path, list or absent), question, answer, verifier?, split?}``.

    An id is a string or a whole number; by default it is a hash of question, answer and image names. Image files must
    exist; they are not opened. Records are dropped as ``bad_json``, ``missing_field``, ``placeholder_mismatch``,
    ``missing_image`` or ``duplicate_id`` (the second and later records of an id).

    Args:
        path: the file.
        image_root: folder that image names are relative to; default: the file's own.
        split: reads only the records with this ``split``.
        need_answer: False if no response is verified; a missing answer is then "".

    Raises:
        DataError: no such file or folder, no record at all, or none of ``split``.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise DataError(f"no such file of questions: {path}")
    root = os.path.abspath(os.path.expanduser(image_root)) if image_root is not None else os.path.dirname(path)
    if not os.path.isdir(root):
        raise DataError(f"{path}: image_root {root} is not a folder")
    result = QuestionSet([], [])
    first_seen: dict[str, str] = {}
    splits: Counter[str] = Counter()
    lines = JsonRecords(path)
    for number in range(len(lines)):
        origin = lines.origin(number)
        try:
            record = lines.record(number)
            splits[str(record.get("split"))] += 1
            if split is not None and record.get("split") != split:
                continue
            question = _question(record, root, origin, need_answer)
            if question.id in first_seen:
                first = first_seen[question.id]
                detail = (
                    f"id {question.id!r} was given at {first} already; give every question an id of its own, or none"
                )
                raise RecordError("duplicate_id", origin, detail)
            first_seen[question.id] = origin
            result.questions.append(question)
        except RecordError as error:
            result.dropped.append(error)
    if split is not None and split not in splits:
        known = ", ".join(f"{name} ({count})" for name, count in splits.most_common(8))
        raise DataError(f"{path}: no record of split {split!r}; there are {known or 'none at all'}")
    if not result.questions and not result.dropped:
        raise DataError(f"{path}: no record in it; write one JSON object a line")
    return result


def _question(record: dict[str, Any], root: str, origin: str, need_answer: bool) -> Question:
    names = _image_names(record, origin)
    text = text_field(record, "question", origin)
    if not text.strip():
        raise RecordError("missing_field", origin, "`question` is empty: nothing to answer")
    placeholders = text.count(IMAGE_PLACEHOLDER)
    if len(names) == 1 and placeholders == 0:
        text = f"{IMAGE_PLACEHOLDER}\n{text}"
    elif placeholders != len(names):
        detail = (
            f"`question` has {placeholders} {IMAGE_PLACEHOLDER} for {len(names)} images; write one at the place of each"
        )
        raise RecordError("placeholder_mismatch", origin, detail)
    answer = _answer(record, origin, need_answer)
    images = tuple(os.path.join(root, name) for name in names)
    for image in images:
        if not os.path.isfile(image):
            raise missing_image(image, origin)
    return Question(
        # Without an id: a hash of the record's own text alone, whatever the place of the data.
        id=_id(record, origin) or content_hash(json.dumps([text, answer, names], ensure_ascii=True), size=8),
        images=images,
        question=text,
        answer=answer,
        verifier=_optional_text(record, "verifier", origin),
        split=_optional_text(record, "split", origin),
        origin=origin,
    )


def _image_names(record: dict[str, Any], origin: str) -> list[str]:
    """Return the paths under ``image``, as written; none if it is absent."""
    value = record.get("image")
    if value is None or value == "":
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        detail = f"`image` must be a path, a list of paths or null, not {json.dumps(value)[:80]}"
        raise RecordError("missing_field", origin, detail)
    return names


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
