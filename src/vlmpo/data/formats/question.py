"""Parse records of one question: with two answers, as MMPR, RLAIF-V and RLHF-V have them, or with the true one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmpo.data.formats.assemble import preference_pair
from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.choices import CHOICE_KEYS, answer_in_letters, read_choices, with_choices
from vlmpo.data.formats.media import is_empty, read_media
from vlmpo.data.formats.turns import text_turn
from vlmpo.data.readers.json import RepeatedKeyError, WrittenNumber, decode_json
from vlmpo.data.records import PreferencePair, json_kind, text_field

_KEYS = frozenset({"question", "chosen", "rejected", "system"})
_ANSWERED_KEYS = frozenset({"id", "question", "answer", "verifier", "split", "system", *CHOICE_KEYS})


def parse_question(record: Mapping[str, Any], context: RecordContext) -> PreferencePair:
    """Parse ``{system?, image or video, question, chosen, rejected}``, as in MMPR (paths) and RLAIF-V (embedded)."""
    question = text_field(record, "question", context.origin)
    if not question.strip() and not any(map(any, read_media(record, context)[:2])):
        raise context.error("missing_field", "`question` is empty and there is no image: nothing to answer")
    chosen = text_field(record, "chosen", context.origin)
    rejected = text_field(record, "rejected", context.origin) if context.need_rejected else None
    return preference_pair(record, [text_turn("user", question)], chosen, rejected, _KEYS, context)


def parse_question_in_text(record: Mapping[str, Any], context: RecordContext) -> PreferencePair:
    """Parse RLHF-V's ``text``, which holds ``{question, chosen, rejected}`` as a string of JSON, or as a mapping."""
    inner = record.get("text")
    if isinstance(inner, str):
        try:
            inner = decode_json(inner)
        except RepeatedKeyError as error:
            raise context.error("ambiguous_field", f"`text`: {error}") from error
        except (ValueError, RecursionError) as error:
            raise context.error("bad_json", f"`text` is not valid JSON ({error})") from error
    if not isinstance(inner, Mapping):
        what = "is missing" if record.get("text") is None else f"must hold an object, not {json_kind(inner)}"
        raise context.error("missing_field", f"`text` {what}")
    outer = {key: value for key, value in record.items() if key != "text"}
    for key in inner:
        if not is_empty(outer.get(key)) and outer[key] != inner[key]:
            raise context.error("ambiguous_field", f"holds `{key}` beside `text` and in it, which differ: leave one")
    return parse_question({**outer, **inner}, context)


def parse_answered(record: Mapping[str, Any], context: RecordContext) -> PreferencePair:
    """Parse ``{question, choices?, answer}``, for fine-tuning: the question as written, the answer as its response.

    Choices are lettered lines after the question, and the answer a letter, as they are for ``vlmpo sample``; the
    instruction of its prompt is not added. Of a list of accepted answers the first is learnt.
    """
    if context.need_rejected:
        raise context.error("missing_field", "`chosen` and `rejected` are missing: it is a question with its answer")
    origin = context.origin
    choices = read_choices(record, origin)
    text = with_choices(text_field(record, "question", origin), choices, origin)
    answer = _first_answer(record, context)
    given = answer if isinstance(answer, str) else str(answer)
    response = answer_in_letters(given, not isinstance(answer, str), choices, origin)
    return preference_pair(record, [text_turn("user", text)], response, None, _ANSWERED_KEYS, context)


def _first_answer(record: Mapping[str, Any], context: RecordContext) -> str | int | float | WrittenNumber:
    """Return the answer, or the first of a list; a number keeps the form it is written in."""
    value = record.get("answer")
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(value, int | float | WrittenNumber) and not isinstance(value, bool):
        return value
    answer = text_field({**record, "answer": value} if "answer" in record else record, "answer", context.origin)
    if not answer.strip():
        raise context.error("empty_response", "`answer` is empty: there is nothing to learn")
    return answer
