"""Assemble turns, media and responses into a PreferencePair: matches images to placeholders, checks the responses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.media import is_empty, read_media
from vlmpo.data.formats.turns import Turn, is_message, read_turns, text_turn
from vlmpo.data.formats.unread import refuse_unread_media
from vlmpo.data.records import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    Message,
    PreferencePair,
    check_length,
    json_kind,
    text_field,
)

# If no placeholder is written: `all` puts every image before the first user's text, `one` does so for a single image.
Lead = Literal["all", "one"]

# They change what the model reads or learns; as metadata they would silently be ignored.
_UNSUPPORTED = ("tools", "chat_template_kwargs", "audio", "audios", "objects")
_FEEDBACK = ("label", "kto_tag")
_COMPLETE = frozenset({"chosen_complete", "rejected_complete"})
# Names under which data sets have the same response.
_CHOSEN = ("chosen", "completion", "output")
_REJECTED = ("rejected", "rejected_response", "rejected_messages")
# Keys of pair files beside the pair itself; see vlmpo.pairs. The first three are in every record.
_PAIR_KEYS = ("question_id", "kind", "settings")
PAIR_FILE_KEYS = frozenset(
    {*_PAIR_KEYS, "answer", "chosen_parsed", "rejected_parsed", "verifier", "model", "samples"}
    | {"kept", "continued_by", "sample"}
)


def preference_pair(
    record: Mapping[str, Any],
    turns: Sequence[Turn],
    chosen: str,
    rejected: str | None,
    read: Collection[str],
    context: RecordContext,
    lead: Lead = "one",
) -> PreferencePair:
    """Return the pair of a record whose conversation was read.

    Args:
        record: the record; its images and videos are read, all other keys become metadata.
        turns: the prompt, without the record's ``system``; its last turn must be the user's.
        chosen: preferred response.
        rejected: the other response, None if it is not needed.
        read: keys that were read already.
        context: where the record comes from.
        lead: where images go in a prompt without placeholders.

    Raises:
        RecordError: ``placeholder_mismatch``, ``bad_conversation``, ``missing_field``, ``ambiguous_field``,
            ``empty_response``, ``identical``, ``unread_media``, ``too_large``, or see
            :func:`vlmpo.data.formats.media.read_media`.
    """
    _refuse_two_responses(record, context)
    turns = with_system(turns, record, context)
    if not turns or turns[-1].role != "user":
        what = f"ends with the {turns[-1].role}'s turn" if turns else "has no turn"
        raise context.error("bad_conversation", f"the prompt {what}; a response answers the user's")
    in_turns = any(medium is not None for turn in turns for medium in (*turn.images, *turn.videos))
    images, videos, media_keys = read_media(record, context, by_other_names=not in_turns)
    read = frozenset((*read, *media_keys, *_COMPLETE))
    if not (images or videos or in_turns):
        refuse_unread_media(record, read, context)
    texts = [turn.text for turn in turns]
    first_user = next(at for at, turn in enumerate(turns) if turn.role == "user")
    # Videos before images, so that the image comes first if both lead.
    videos = place(texts, [turn.videos for turn in turns], videos, "video", lead, first_user, context)
    images = place(texts, [turn.images for turn in turns], images, "image", lead, first_user, context)
    check_length(sum(map(len, texts)), "the prompt", context.origin)
    if not texts[-1].strip() and not images and not videos:
        raise context.error("missing_field", "the prompt is empty and there is no image: nothing to answer")
    if not chosen.strip():
        raise context.error("empty_response", "`chosen` is empty: there is nothing to score")
    if context.need_rejected and not (rejected or "").strip():
        raise context.error("empty_response", "`rejected` is empty: there is nothing to score")
    if context.need_rejected and chosen == rejected:
        raise context.error("identical", "`chosen` and `rejected` are the same: no preference to learn")
    return PreferencePair(
        prompt=tuple(Message(turn.role, text) for turn, text in zip(turns, texts, strict=True)),
        images=images,
        videos=videos,
        chosen=chosen,
        rejected=rejected,
        source=context.source,
        origin=context.origin,
        max_tiles=context.max_tiles,
        metadata={key: value for key, value in record.items() if key not in read},
        chosen_complete=_said_complete(record, "chosen_complete", context),
        rejected_complete=_said_complete(record, "rejected_complete", context),
        as_sampled=is_from_pair_file(record),
    )


def is_from_pair_file(record: Mapping[str, Any]) -> bool:
    """Return whether ``vlmpo pair`` wrote the record: its responses are what a model wrote right after the prompt."""
    id_, kind, settings = (record.get(key) for key in _PAIR_KEYS)
    return isinstance(id_, str) and isinstance(kind, str) and isinstance(settings, Mapping)


def unread_keys(pair: PreferencePair) -> list[str]:
    """Return the keys of a pair's record of which nothing was read, without those that ``vlmpo pair`` writes."""
    known = PAIR_FILE_KEYS if pair.as_sampled else ()
    return [key for key, value in pair.metadata.items() if key not in known and not is_empty(value)]


def _said_complete(record: Mapping[str, Any], key: str, context: RecordContext) -> bool | None:
    value = record.get(key)
    if value is not None and not isinstance(value, bool):
        raise context.error("missing_field", f"`{key}` must be true or false, not {json_kind(value)}")
    return value


def _refuse_two_responses(record: Mapping[str, Any], context: RecordContext) -> None:
    """Raise RecordError ``ambiguous_field`` if the record has two different texts for one response."""
    for names in (_CHOSEN, _REJECTED) if context.need_rejected else (_CHOSEN,):
        if sum(name in record for name in names) < 2:
            continue
        said = {name: text for name in names if (text := _last_text(record.get(name))) is not None}
        first, *others = said or [""]
        for other in others:
            if said[other] != said[first]:
                detail = f"holds `{first}` and `{other}`, which differ: leave the one that is meant"
                raise context.error("ambiguous_field", detail)


def _last_text(value: Any) -> str | None:
    """Return a text, or that of a message or of the last of several; None if it is none of these or empty."""
    if isinstance(value, list | tuple) and value:
        value = value[-1]
    if is_message(value):
        content = value.get("content")
        value = value.get("value") if content is None else content
        if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Mapping):
            value = value[0].get("text")
    return value if isinstance(value, str) and value else None


def require_agreeing_prompt(record: Mapping[str, Any], turns: Sequence[Turn], context: RecordContext) -> None:
    """Raise RecordError ``prompts_differ`` if a ``prompt`` beside a whole conversation is not the same prompt.

    It is the same if its messages are, system turns left out or not, or if its text is that of the first or the last
    user's turn, or of several turns one after the other; spaces and placeholders do not count.
    """
    given = record.get("prompt")
    if is_empty(given):
        return
    if isinstance(given, str):
        said = [turn.text for turn in turns if turn.role == "user"]
        known = [*said[:1], *said[-1:], " ".join(said), " ".join(turn.text for turn in turns)]
        agrees = _words(given) in map(_words, known)
    else:
        whole = {"prompt": [given]} if is_message(given) else record
        others = [(turn.role, _words(turn.text)) for turn in read_turns(whole, "prompt", context)]
        own = [(turn.role, _words(turn.text)) for turn in turns]
        agrees = others in (own, [turn for turn in own if turn[0] != "system"])
        agrees = agrees or own == [turn for turn in others if turn[0] != "system"]
    if not agrees:
        detail = "`prompt` is not what the conversation begins with; leave one of them, or make them the same"
        raise context.error("prompts_differ", detail)


def _words(text: str) -> list[str]:
    return text.replace(IMAGE_PLACEHOLDER, " ").replace(VIDEO_PLACEHOLDER, " ").split()


def refuse_unsupported(record: Mapping[str, Any], context: RecordContext) -> None:
    """Raise RecordError if a record of a conversation holds something that vlmpo cannot honour."""
    for key in _UNSUPPORTED:
        if not is_empty(value := record.get(key)) and not (isinstance(value, str) and value in ("[]", "{}")):
            raise context.error("unsupported_field", f"`{key}` is not supported; take it or the record out")
    for key in _FEEDBACK:
        if record.get(key) is False:
            detail = f"`{key}` is false: a response marked as bad would be learnt; take the record out, or pair it"
            raise context.error("unpaired_feedback", detail)


def with_system(turns: Sequence[Turn], record: Mapping[str, Any], context: RecordContext) -> Sequence[Turn]:
    """Return ``turns`` after the record's ``system`` prompt, unless they begin with one."""
    if is_empty(record.get("system")) or (turns and turns[0].role == "system"):
        return turns
    return [text_turn("system", text_field(record, "system", context.origin)), *turns]


def place(
    texts: list[str],
    slots: Sequence[tuple[Any, ...]],
    given: tuple[Any, ...],
    kind: str,
    lead: Lead,
    first_user: int,
    context: RecordContext,
) -> tuple[Any, ...]:
    """Return one image or video for each placeholder, in order: the turn's own, else the next ``given`` one.

    If no placeholder is written, ``lead`` may put some into ``texts``.
    """
    flat = [medium for turn in slots for medium in turn]
    if not flat and given and (lead == "all" or len(given) == 1):
        texts[first_user] = f"<{kind}>\n" * len(given) + texts[first_user]
        return given
    unfilled = sum(medium is None for medium in flat)
    if unfilled != len(given):
        detail = f"the prompt has {unfilled} <{kind}> for {len(given)} {kind}s; write one at the place of each"
        raise context.error("placeholder_mismatch", detail)
    rest = iter(given)
    return tuple(next(rest) if medium is None else medium for medium in flat)
