"""Read conversations in all the forms of data sets into turns: who speaks, and text with a placeholder an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.media import is_empty, medium
from vlmpo.data.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, checked_text, json_kind
from vlmpo.errors import shorten

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# Parts of a message that change what a model reads or writes, and that a plain turn has no place for.
_UNSUPPORTED = ("tool_calls", "tool_call_id", "reasoning_content", "thinking")


# OpenAI's names of items of a message's content.
_KINDS = {"image_url": "image", "video_url": "video"}


class Turn(NamedTuple):
    """Holds one turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        text: text with a placeholder for each image or video.
        images: one entry for each placeholder, in order: the image if the message itself holds it, else None.
        videos: the same for videos.
    """

    role: str
    text: str
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()


def text_turn(role: str, text: str) -> Turn:
    """Return a turn of plain text, whose placeholders are still to be filled."""
    return Turn(role, text, (None,) * text.count(IMAGE_PLACEHOLDER), (None,) * text.count(VIDEO_PLACEHOLDER))


def message_list(value: Any) -> list[Any] | None:
    """Return ``value`` as a list of messages; None if it is not one.

    Older ``datasets`` hold a list of messages as one mapping of lists, all of one length.
    """
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            return None
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    return list(value) if isinstance(value, list | tuple) else None


def is_message(value: Any) -> bool:
    """Return whether ``value`` is a mapping that names a speaker."""
    return isinstance(value, Mapping) and any(isinstance(value.get(key), str) for key in ("role", "from"))


def is_conversation(value: Any) -> bool:
    """Return whether ``value`` is a list of messages, not empty."""
    messages = message_list(value)
    return bool(messages) and all(is_message(message) for message in messages or ())


def holds_prompt(conversation: Any) -> bool:
    """Return whether a user speaks in it, and no assistant first: it is then more than the assistant's answer."""
    speakers = [message.get("role") or message.get("from") for message in message_list(conversation) or []]
    return speakers[0] not in ("assistant", "gpt") and any(speaker in ("user", "human") for speaker in speakers)


def read_turns(record: Mapping[str, Any], key: str, context: RecordContext) -> list[Turn]:
    """Read the list of messages under ``key``, ``{role, content}`` or ``{from, value}``, content as text or as items.

    Raises:
        RecordError: ``missing_field`` if there is no such list; ``bad_conversation`` for a message that is not a turn
            of system, user or assistant.
    """
    value = record.get(key)
    messages = message_list(value)
    if not messages:
        what = "is missing" if value is None else "must be a list of messages, not empty"
        raise context.error("missing_field", f"`{key}` {what}")
    return [read_turn(message, f"{key}[{at}]", context) for at, message in enumerate(messages)]


def read_turn(message: Any, key: str, context: RecordContext) -> Turn:
    """Read one message; see :func:`read_turns`."""
    if not isinstance(message, Mapping):
        raise context.error("bad_conversation", f"`{key}` must be a message {{role, content}}, not {message!r:.60}")
    name = message.get("role") or message.get("from")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        remedy = "take the record out, or write what matters of it into the user's turn"
        known = f"known roles are {', '.join(_ROLES)}; {remedy}"
        if name is None:
            held = shorten(", ".join(f"`{part}`" for part in message))
            raise context.error("bad_conversation", f"`{key}` names no `role` or `from`, it holds {held}; {known}")
        detail = f"`{key}` is a turn of {shorten(repr(name))}, which is not supported; {known}"
        raise context.error("bad_conversation", detail)
    for part in _UNSUPPORTED:
        if message.get(part):
            remedy = "take the record out, or write it into the message's text"
            raise context.error("bad_conversation", f"`{key}` holds `{part}`, which is not supported; {remedy}")
    content = message.get("content")
    content = message.get("value") if content is None else content
    if isinstance(content, list | tuple):
        return _of_items(role, content, key, context)
    if not isinstance(content, str):
        raise context.error("bad_conversation", f"`{key}` has no text: its content is {json_kind(content)}")
    return text_turn(role, checked_text(content, key, context.origin))


def _of_items(role: str, items: Sequence[Any], key: str, context: RecordContext) -> Turn:
    text: list[str] = []
    media: dict[str, list[Any]] = {"image": [], "video": []}
    for at, item in enumerate(items):
        kind = item.get("type") if isinstance(item, Mapping) else None
        kind = _KINDS.get(kind, kind) if isinstance(kind, str) else kind
        where = f"{key}.content[{at}]"
        if kind == "text" and isinstance(item.get("text"), str):
            text.append(checked_text(item["text"], where, context.origin))
            plain = text_turn(role, item["text"])
            media["image"] += plain.images
            media["video"] += plain.videos
        elif isinstance(kind, str) and kind in media and role == "assistant":
            detail = f"`{where}` is of type {kind!r} in an assistant's turn, which must be text"
            raise context.error("bad_conversation", detail)
        elif isinstance(kind, str) and kind in media:
            # The encoder removes one newline after a placeholder, so the next item's own text stays as it is.
            text.append(f"<{kind}>\n")
            names = (kind, f"{kind}_url", "path", "url", "base64", "source")
            value = next((item[name] for name in names if not is_empty(item.get(name))), None)
            media[kind].append(None if value is None else medium(value, kind, where, context))
        else:
            what = f"is of type {shorten(repr(kind))}" if kind != "text" else "has no text"
            raise context.error("bad_conversation", f"`{where}` {what}; known are text, image and video")
    return Turn(role, "".join(text), tuple(media["image"]), tuple(media["video"]))


def response_of(record: Mapping[str, Any], key: str, context: RecordContext) -> str:
    """Return the response under ``key``: a text, an assistant's message, or a list of one such message.

    Raises:
        RecordError: ``missing_field`` if it is none of these; ``bad_conversation`` for another number of messages,
            another speaker, or a response with an image.
    """
    value = record.get(key)
    if isinstance(value, str):
        return checked_text(value, key, context.origin)
    if is_message(value):
        return _assistant_text(read_turn(value, key, context), key, context)
    if value is None or message_list(value) is None:
        what = "is missing" if value is None else f"must be a text or a message, not {json_kind(value)}"
        raise context.error("missing_field", f"`{key}` {what}")
    turns = read_turns(record, key, context)
    if len(turns) != 1:
        remedy = "move the turns before the last into the prompt"
        raise context.error("bad_conversation", f"`{key}` holds {len(turns)} messages, one is scored; {remedy}")
    return _assistant_text(turns[0], key, context)


def rejected_of(record: Mapping[str, Any], context: RecordContext) -> str | None:
    """Return the response under ``rejected``; None if it is not needed. Raises as :func:`response_of`."""
    return response_of(record, "rejected", context) if context.need_rejected else None


def key_or(record: Mapping[str, Any], key: str, other: str) -> str:
    """Return ``key``, or ``other`` if the record holds something under that alone."""
    return other if record.get(key) is None and record.get(other) is not None else key


def split_response(turns: Sequence[Turn], key: str, context: RecordContext) -> tuple[list[Turn], str]:
    """Split a conversation into the turns before the last, and the text of that, which must be the assistant's."""
    return list(turns[:-1]), _assistant_text(turns[-1], key, context)


def _assistant_text(turn: Turn, key: str, context: RecordContext) -> str:
    if turn.role != "assistant":
        raise context.error("bad_conversation", f"the last turn of `{key}` is the {turn.role}'s, not the assistant's")
    return turn.text
