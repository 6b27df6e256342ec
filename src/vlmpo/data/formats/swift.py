"""Parse ms-swift's records, and OpenAI-style messages: a conversation that ends in the chosen response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmpo.data.formats.assemble import preference_pair, refuse_unsupported, require_agreeing_prompt, with_system
from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.media import is_empty, media_of
from vlmpo.data.formats.trl import require_same_prompt
from vlmpo.data.formats.turns import Turn, message_list, read_turns, response_of, split_response
from vlmpo.data.records import PreferencePair

_REJECTED = ("rejected_response", "rejected_messages", "rejected_images", "rejected_videos")
_KEYS = frozenset({"messages", "system", "prompt", *_REJECTED})


def parse_swift(record: Mapping[str, Any], context: RecordContext) -> PreferencePair:
    """Parse ``{messages, rejected_response or rejected_messages}``; for fine-tuning ``messages`` alone.

    Images without placeholders go before the first user's text.
    """
    refuse_unsupported(record, context)
    turns = with_system(read_turns(record, "messages", context), record, context)
    if (message_list(record["messages"]) or [{}])[-1].get("loss") is False:
        raise context.error(
            "unsupported_field", "the last message has `loss` false, and it alone is scored; take it out"
        )
    prompt, chosen = split_response(turns, "messages", context)
    require_agreeing_prompt(record, prompt, context)
    rejected = _rejected(record, prompt, context) if context.need_rejected else None
    return preference_pair(record, prompt, chosen, rejected, _KEYS, context, lead="all")


def _rejected(record: Mapping[str, Any], prompt: list[Turn], context: RecordContext) -> str:
    for kind in ("image", "video"):
        other = media_of({kind: record.get(f"rejected_{kind}s")}, kind, context)
        if other and other != media_of(record, kind, context):
            raise context.error("prompts_differ", f"`rejected_{kind}s` are not `{kind}s`; only the response may differ")
    if is_empty(record.get("rejected_messages")):
        if record.get("rejected_response") is None and not is_empty(record.get("rejected")):
            raise context.error(
                "missing_field", "`rejected_response` is missing; rename `rejected`, or name the format"
            )
        return response_of(record, "rejected_response", context)
    turns = with_system(read_turns(record, "rejected_messages", context), record, context)
    other_prompt, rejected = split_response(turns, "rejected_messages", context)
    require_same_prompt(prompt, other_prompt, "messages", "rejected_messages", context)
    return rejected
