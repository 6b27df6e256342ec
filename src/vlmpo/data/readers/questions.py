"""Read files of questions with their answers, JSON Lines."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vlmpo.data.encode.images import missing_file
from vlmpo.data.formats.assemble import place
from vlmpo.data.formats.base import PathRules, RecordContext
from vlmpo.data.formats.choices import CHOICE_KEYS, answer_in_letters, read_choices, with_choices
from vlmpo.data.formats.media import is_empty, read_media
from vlmpo.data.formats.turns import text_turn
from vlmpo.data.formats.unread import refuse_unread_media
from vlmpo.data.readers.json import JsonRecords, WrittenNumber
from vlmpo.data.readers.near_root import no_folder, root_of, with_root
from vlmpo.data.records import Question, check_length, json_kind, one_record, text_field
from vlmpo.errors import DataError, RecordError, printable, shorten
from vlmpo.hashing import content_hash

_KEYS = frozenset({"id", "question", "answer", "verifier", "split", *CHOICE_KEYS})

_SHOWN_KEYS = 50  # of those that nothing reads


@dataclass(frozen=True)
class QuestionSet:
    """Holds the questions of one file, in its order, and the errors of the other records.

    Attributes:
        questions: questions, all with different ids.
        dropped: one error for each record that cannot be used.
        unread: in how many of the questions' records each key holds something that is not read, nor shown to a model.
    """

    questions: list[Question]
    dropped: list[RecordError]
    unread: Counter[str] = field(default_factory=Counter)

    def counts(self) -> dict[str, int]:
        """Count the dropped records by reason, the most frequent first."""
        return dict(Counter(error.reason for error in self.dropped).most_common())

    def unread_notice(self) -> str:
        """Return one line for the user on ``unread``."""
        listed = ", ".join(f"{shorten(key)} ({count})" for key, count in self.unread.most_common(_SHOWN_KEYS))
        if (more := len(self.unread) - _SHOWN_KEYS) > 0:
            listed += f", and {more} more"
        return printable(f"keys of the questions that are not read nor shown to the model: {listed}")


def read_questions(
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    need_answer: bool = True,
    confine: bool = False,
) -> QuestionSet:
    """Read a JSON Lines file of ``{id?, image?, question, choices?, answer, verifier?, split?}``.

    Images and videos are read as those of pairs; their files must exist and are not opened. ``choices`` (or
    ``options``) are put after the question as lettered lines, and the answer becomes a letter: see
    :mod:`vlmpo.data.formats.choices`. Any other answer that is a number keeps its written form. An id is a string or a
    whole number; by default it is a hash of question, answer and image names. Records are dropped under the reasons of
    pairs, or as ``ambiguous_answer``, ``answer_not_a_choice`` or ``duplicate_id`` (the second and later records of an
    id).

    Args:
        path: the file.
        image_root: folder that image names are relative to; default: the file's own.
        split: reads only the records with this ``split``.
        need_answer: False if no response is verified; a missing answer is then "".
        confine: refuse images and videos outside ``image_root``, links followed.

    Raises:
        DataError: no such file or folder, no record at all, or none of ``split``.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise DataError(f"no such file of questions: {path}")
    root = os.path.abspath(os.path.expanduser(image_root)) if image_root is not None else os.path.dirname(path)
    if not os.path.isdir(root):
        raise DataError(f"{path}: {no_folder(root)}")
    result = QuestionSet([], [])
    first_seen: dict[str, str] = {}
    splits: Counter[str] = Counter()
    lines = JsonRecords(path, numbers_as_written=True)
    paths, missing = PathRules(confine=confine), list[str]()
    for number in range(len(lines)):
        origin = lines.origin(number)
        try:
            record = lines.record(number)
            splits[str(record.get("split"))] += 1
            if split is not None and record.get("split") != split:
                continue
            with one_record(origin):
                context = RecordContext(origin, image_root=root, paths=paths)
                question, unread = _question(record, context, need_answer, missing)
            if question.id in first_seen:
                first = first_seen[question.id]
                remedy = "give every question an id of its own, or none"
                detail = f"id {shorten(repr(question.id))} was given at {first} already; {remedy}"
                raise RecordError("duplicate_id", origin, detail)
            first_seen[question.id] = origin
            result.questions.append(question)
            result.unread.update(unread)
        except RecordError as error:
            result.dropped.append(error)
    if 2 * len(missing) > len(result.questions) + len(result.dropped) and (near := root_of(missing, root)) is not None:
        result.dropped[:] = [with_root(error, near) for error in result.dropped]
    if split is not None and split not in splits:
        known = ", ".join(f"{name} ({count})" for name, count in splits.most_common(8))
        raise DataError(f"{path}: no record of split {split!r}; there are {known or 'none at all'}")
    if not result.questions and not result.dropped:
        raise DataError(f"{path}: no record in it; write one JSON object a line")
    return result


def _question(
    record: dict[str, Any], context: RecordContext, need_answer: bool, missing: list[str]
) -> tuple[Question, list[str]]:
    """Return the question of a record, and the keys of which nothing was read; add a missing file to ``missing``."""
    origin = context.origin
    images, videos, media_keys = read_media(record, context)
    if not images and not videos:
        refuse_unread_media(record, _KEYS | media_keys, context)
    text = text_field(record, "question", origin)
    if not text.strip():
        raise RecordError("missing_field", origin, "`question` is empty: nothing to answer")
    choices = read_choices(record, origin)
    turn = text_turn("user", with_choices(text, choices, origin))
    texts = [turn.text]
    videos = place(texts, [turn.videos], videos, "video", "one", 0, context)
    images = place(texts, [turn.images], images, "image", "one", 0, context)
    check_length(len(texts[0]), "the question", origin)
    answer = _answer(record, origin, need_answer)
    if answer:
        answer = answer_in_letters(answer, not isinstance(record["answer"], str), choices, origin)
    for kind, media in (("image", images), ("video", videos)):
        for medium in media:
            if isinstance(medium, str) and not os.path.isfile(medium):
                missing.append(medium)
                raise missing_file(medium, origin, kind)
    # Without an id: a hash of the record's own text alone, whatever the place of the data.
    names = [_name(medium, context.image_root) for medium in (*images, *videos)]
    question = Question(
        id=_id(record, origin) or content_hash(json.dumps([texts[0], answer, names], ensure_ascii=True), size=8),
        images=images,
        question=texts[0],
        answer=answer,
        verifier=_optional_text(record, "verifier", origin),
        split=_optional_text(record, "split", origin),
        origin=origin,
        videos=videos,
    )
    read = _KEYS | media_keys
    return question, [key for key, value in record.items() if key not in read and not is_empty(value)]


def _name(medium: str | bytes, root: str) -> str:
    """Return the path of an image or video as it is written, or a hash of an embedded one."""
    return medium.removeprefix(os.path.join(root, "")) if isinstance(medium, str) else content_hash(medium)


def _answer(record: dict[str, Any], origin: str, needed: bool) -> str:
    value = record.get("answer")
    if isinstance(value, WrittenNumber):
        return value.text  # 2.50 and 1e3 are what people write; 2.5 and 1000.0 is what Python makes of them
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
    if isinstance(value, WrittenNumber) and value.text.removeprefix("-").isdecimal():
        return value.text
    if not isinstance(value, str) or not value:
        detail = f"`id` must be a string that is not empty or a whole number, not {json_kind(value)}"
        raise RecordError("missing_field", origin, detail)
    return text_field(record, "id", origin)
