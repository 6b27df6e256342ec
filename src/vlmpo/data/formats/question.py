"""Parse records of one question with two answers: MMPR, RLAIF-V, RLHF-V."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmpo.data.formats.assemble import preference_pair
from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.media import is_empty, read_media
from vlmpo.data.formats.turns import text_turn
from vlmpo.data.readers.json import RepeatedKeyError, decode_json
from vlmpo.data.records import PreferencePair, json_kind, text_field

_KEYS = frozenset({"question", "chosen", "rejected", "system"})


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
