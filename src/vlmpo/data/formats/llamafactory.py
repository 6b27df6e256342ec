"""Parse LLaMA-Factory's two kinds of records: ShareGPT conversations and Alpaca instructions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmpo.data.formats.assemble import preference_pair, refuse_unsupported, require_agreeing_prompt
from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.media import is_empty
from vlmpo.data.formats.turns import Turn, key_or, read_turns, rejected_of, response_of, split_response, text_turn
from vlmpo.data.records import PreferencePair, json_kind, text_field

_CONVERSATION_KEYS = frozenset({"conversations", "messages", "chosen", "rejected", "system", "prompt"})
_ALPACA_KEYS = frozenset({"instruction", "input", "output", "chosen", "rejected", "history", "system"})


def parse_sharegpt(record: Mapping[str, Any], context: RecordContext) -> PreferencePair:
    """Parse ``{conversations, chosen, rejected}``; for fine-tuning ``conversations`` alone, whose last turn is scored.

    ``messages`` may replace ``conversations``. The conversation's own system turn takes precedence over ``system``.
    """
    refuse_unsupported(record, context)
    key = key_or(record, "conversations", "messages")
    turns = read_turns(record, key, context)
    has_both = key == "conversations" and not is_empty(record.get("messages"))
    if has_both and read_turns(record, "messages", context) != turns:
        raise context.error("ambiguous_field", "holds `conversations` and `messages`, which differ: leave one")
    if record.get("chosen") is None and not context.need_rejected:
        turns, chosen = split_response(turns, key, context)
    else:
        chosen = response_of(record, "chosen", context)
    require_agreeing_prompt(record, turns, context)
    return preference_pair(record, turns, chosen, rejected_of(record, context), _CONVERSATION_KEYS, context)


def parse_alpaca(record: Mapping[str, Any], context: RecordContext) -> PreferencePair:
    """Parse ``{instruction, input?, chosen, rejected, history?, system?}``; for fine-tuning ``output`` replaces chosen.

    The user's turn is the instruction, and on the next line the input.
    """
    refuse_unsupported(record, context)
    parts = [text_field(record, "instruction", context.origin)]
    if record.get("input") is not None:
        parts.append(text_field(record, "input", context.origin))
    turns = [*_history(record, context), text_turn("user", "\n".join(filter(None, parts)))]
    chosen = response_of(record, key_or(record, "chosen", "output"), context)
    return preference_pair(record, turns, chosen, rejected_of(record, context), _ALPACA_KEYS, context)


def _history(record: Mapping[str, Any], context: RecordContext) -> list[Turn]:
    turns: list[Turn] = []
    history = record.get("history")
    if is_empty(history):
        return turns
    if not isinstance(history, list | tuple):
        detail = f"`history` must be a list of instructions and their responses, not {json_kind(history)}"
        raise context.error("bad_conversation", detail)
    for at, exchange in enumerate(history):
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise context.error("bad_conversation", f"`history[{at}]` must be an instruction and its response")
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            turns.append(text_turn(role, text_field({f"history[{at}]": text}, f"history[{at}]", context.origin)))
    return turns
