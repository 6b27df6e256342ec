"""List the formats that vlmpo reads, and recognise that of a data set by its first records."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmpo.data.formats.base import Format
from vlmpo.data.formats.choices import CHOICE_KEYS
from vlmpo.data.formats.llamafactory import parse_alpaca, parse_sharegpt
from vlmpo.data.formats.media import MEDIA_KEYS, is_empty, is_null, kind_of_key
from vlmpo.data.formats.question import parse_answered, parse_question, parse_question_in_text
from vlmpo.data.formats.swift import parse_swift
from vlmpo.data.formats.trl import parse_explicit, parse_implicit
from vlmpo.data.formats.turns import holds_prompt, is_conversation, is_message
from vlmpo.errors import DataError, shorten

HEAD = 8  # records looked at
AUTO = "auto"
_SHOWN_KEYS = 20


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("mmpr", "MMPR", "`question`, `chosen`, `rejected`, `image` or `video` as paths", parse_question),
        Format("rlaif_v", "RLAIF-V", "`question`, `chosen`, `rejected`, `image` embedded", parse_question),
        Format(
            "rlhf_v", "RLHF-V", "`text` with question, chosen and rejected as JSON, `image`", parse_question_in_text
        ),
        Format("trl", "TRL, explicit prompt", "`prompt`, `chosen`, `rejected`, `images`", parse_explicit),
        Format("trl_implicit", "TRL, implicit prompt", "`chosen` and `rejected`, whole conversations", parse_implicit),
        Format(
            "sharegpt", "LLaMA-Factory, ShareGPT", "`conversations`, `chosen`, `rejected`, `images`", parse_sharegpt
        ),
        Format("alpaca", "LLaMA-Factory, Alpaca", "`instruction`, `input`, `chosen`, `rejected`", parse_alpaca),
        Format("swift", "ms-swift", "`messages`, `rejected_response` or `rejected_messages`, `images`", parse_swift),
        Format(
            "questions",
            "questions with answers, for fine-tuning",
            "`question`, `answer`, `choices`, `image`",
            parse_answered,
            is_ranking=False,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Recognised:
    """Names the format of a data set, and the grounds on which it was chosen."""

    format: Format
    why: str


def recognise(
    records: Sequence[Mapping[str, Any]], name: str, where: str, *, need_rejected: bool = False
) -> Recognised:
    """Return the one format of a data set.

    Args:
        records: its first few readable records.
        name: a name in FORMATS, or AUTO to judge by the records.
        where: name of the data set, for messages.
        need_rejected: whether pairs are needed.

    Raises:
        DataError: an unknown name, records that fit no format, or questions if pairs are needed.
    """
    found = _recognised(records, name, where)
    if need_rejected and not found.format.is_ranking:
        raise DataError(
            f"{where}: holds questions with their answers, and pairs of responses are needed: make them by `vlmpo "
            "sample` and `vlmpo pair correctness` with this file under build.questions, or fine-tune on the answers "
            "with loss.weights: {nll: 1}"
        )
    return found


def _recognised(records: Sequence[Mapping[str, Any]], name: str, where: str) -> Recognised:
    if name != AUTO:
        if name not in FORMATS:
            raise DataError(f"{where}: format: {name!r} is not known; known are {AUTO}, {', '.join(FORMATS)}")
        return Recognised(FORMATS[name], "named under `format`")
    if not records:
        return Recognised(FORMATS["mmpr"], "taken for granted: none of its first records could be read")
    sample: dict[str, Any] = {}  # for each key its first value, empty ones only if no record has another
    for record in records:
        for key, value in record.items():
            if not is_null(value) and (key not in sample or is_empty(sample[key])):
                sample[key] = value
    match = _match(sample)
    if match is None:
        known = "; ".join(f"{format.name} ({format.keys})" for format in FORMATS.values())
        held = ", ".join(f"`{shorten(key)}`" for key in itertools.islice(sample, _SHOWN_KEYS)) or "nothing"
        raise DataError(
            f"{where}: its first records hold {held}, which fits no format; known are: {known}. Rename the keys, or "
            "name the format under `format`"
        )
    detected, keys, remark = match
    media = [key for key in MEDIA_KEYS if key in sample] or [key for key in sample if kind_of_key(key)]
    shown = [f"`{key}` ({_kind(sample[key])})" for key in (*keys, *media) if key in sample]
    return Recognised(FORMATS[detected], f"has {', '.join(shown)}{f'; {remark}' if remark else ''}")


_LAST_TURN = "the last assistant's turn alone is scored"


def _match(sample: Mapping[str, Any]) -> tuple[str, tuple[str, ...], str] | None:
    """Return the name of the format, the keys that decide, and a remark on how it is read; None if none fits."""
    chosen = sample.get("chosen")
    if "conversations" in sample:
        remark = "" if chosen is not None else _LAST_TURN
        return "sharegpt", ("conversations", "system", "chosen", "rejected"), remark
    if is_conversation(chosen) and holds_prompt(chosen):
        return "trl_implicit", ("system", "chosen", "rejected"), ""
    if "prompt" in sample and ("completion" in sample or chosen is not None):
        remark = "the prompt is put as the user's turn" if isinstance(sample["prompt"], str) else ""
        return "trl", ("system", "prompt", "chosen", "rejected", "completion"), remark
    if "messages" in sample and chosen is not None:
        return "sharegpt", ("messages", "system", "chosen", "rejected"), ""
    if "messages" in sample:
        keys = ("messages", "system", "rejected_response", "rejected_messages")
        return "swift", keys, "" if any(key in sample for key in keys[2:]) else _LAST_TURN
    if "instruction" in sample and (chosen is not None or "output" in sample):
        return "alpaca", ("instruction", "input", "output", "chosen", "rejected", "history", "system"), ""
    if "question" in sample and chosen is not None:
        embedded = any(_kind(sample[key]).startswith("embedded") for key in ("image", "images") if key in sample)
        return ("rlaif_v" if embedded else "mmpr"), ("system", "question", "chosen", "rejected"), ""
    if "question" in sample and "answer" in sample and "rejected" not in sample:
        remark = "the question is the prompt as it is, the answer (the first, of several) the response"
        return "questions", ("system", "question", *CHOICE_KEYS, "answer"), remark
    text = sample.get("text")
    if isinstance(text, Mapping) or (isinstance(text, str) and text.lstrip().startswith("{") and '"chosen"' in text):
        return "rlhf_v", ("text",), ""
    if isinstance(chosen, str) and isinstance(sample.get("rejected"), str):
        remark = "the words both begin with are the prompt, put as the user's turn"
        return "trl_implicit", ("chosen", "rejected"), remark
    return None


def _kind(value: Any) -> str:
    """Return a word or two for a value, for messages."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bytes):
        return "embedded"
    if isinstance(value, Image.Image):
        return "embedded, PIL"
    if is_conversation(value):
        return "messages"
    if is_message(value):
        return "a message"
    if isinstance(value, Mapping):
        return "embedded" if isinstance(value.get("bytes"), bytes) else "path" if "path" in value else "object"
    if isinstance(value, list | tuple):
        return f"{_kind(value[0])}, a list" if value else "list"
    return type(value).__name__
