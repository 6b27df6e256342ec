"""Parse TRL's preference records: with an explicit prompt, or one that chosen and rejected begin with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from vlmpo.data.formats.assemble import preference_pair, refuse_unsupported, require_agreeing_prompt
from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.turns import (
    Turn,
    holds_prompt,
    is_conversation,
    key_or,
    read_turns,
    rejected_of,
    response_of,
    split_response,
    text_turn,
)
from vlmpo.data.records import PreferencePair, text_field

_KEYS = frozenset({"prompt", "chosen", "rejected", "completion", "system"})


def parse_explicit(record: Mapping[str, Any], context: RecordContext) -> PreferencePair:
    """Parse ``{prompt, chosen, rejected}``, each a text or messages; for fine-tuning also ``{prompt, completion}``.

    A prompt of plain text is the user's turn; a ``system`` key goes before it. Images without placeholders go before
    the first user's text. A record whose ``chosen`` is a whole conversation is parsed by :func:`parse_implicit`.
    """
    if is_conversation(record.get("chosen")) and holds_prompt(record["chosen"]):
        return parse_implicit(record, context)
    refuse_unsupported(record, context)
    if isinstance(record.get("prompt"), str):
        turns = [text_turn("user", text_field(record, "prompt", context.origin))]
    else:
        turns = read_turns(record, "prompt", context)
    chosen = response_of(record, key_or(record, "chosen", "completion"), context)
    return preference_pair(record, turns, chosen, rejected_of(record, context), _KEYS, context, lead="all")


def parse_implicit(record: Mapping[str, Any], context: RecordContext) -> PreferencePair:
    """Parse ``{chosen, rejected}``, each a whole conversation: the same prompt and then, as last turn, the response.

    A ``prompt`` beside them is not needed. Raises RecordError ``prompts_differ`` if it is another one, or the prompts
    are not the same; or as other formats do.
    """
    refuse_unsupported(record, context)
    if isinstance(record.get("chosen"), str):
        turns, chosen, rejected = _split_texts(record, context)
        require_agreeing_prompt(record, turns, context)
    else:
        turns, chosen = split_response(read_turns(record, "chosen", context), "chosen", context)
        require_agreeing_prompt(record, turns, context)
        rejected = _rejected(record, turns, context) if context.need_rejected else None
    return preference_pair(record, turns, chosen, rejected, _KEYS, context, lead="all")


def _rejected(record: Mapping[str, Any], prompt: list[Turn], context: RecordContext) -> str:
    other, rejected = split_response(read_turns(record, "rejected", context), "rejected", context)
    require_same_prompt(prompt, other, "chosen", "rejected", context)
    return rejected


def require_same_prompt(
    prompt: list[Turn], other: list[Turn], key: str, other_key: str, context: RecordContext
) -> None:
    """Raise RecordError ``prompts_differ`` if the turns before two responses are not the same."""
    if prompt == other:
        return
    same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(prompt, other, strict=False)))
    detail = f"the prompts of `{key}` and `{other_key}` differ from turn {same + 1} on; only the last turn may"
    raise context.error("prompts_differ", detail)


def _split_texts(record: Mapping[str, Any], context: RecordContext) -> tuple[list[Turn], str, str | None]:
    """Split plain texts: what both begin with, up to its last space, is the prompt."""
    texts = [text_field(record, key, context.origin) for key in ("chosen", "rejected")]
    if texts[0] == texts[1]:
        raise context.error("identical", "`chosen` and `rejected` are the same: no preference to learn")
    # TRL cuts where the texts first differ, even within a word; here a response begins with a whole word.
    common = "".join(one for one, other in takewhile(lambda both: both[0] == both[1], zip(*texts, strict=False)))
    prompt = re.sub(r"\S+\Z", "", common).removesuffix(" ")
    if not prompt.strip():
        detail = "`chosen` and `rejected` begin with no common prompt; give one under `prompt`"
        raise context.error("prompts_differ", detail)
    rejected = texts[1][len(prompt) :] if context.need_rejected else None
    return [text_turn("user", prompt)], texts[0][len(prompt) :], rejected
