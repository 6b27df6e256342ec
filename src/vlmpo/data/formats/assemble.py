"""Assemble turns, media and responses into a PreferencePair: matches images to placeholders, checks the responses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.media import MEDIA_KEYS, is_null, media_of
from vlmpo.data.formats.turns import Turn, text_turn
from vlmpo.data.records import Message, PreferencePair, text_field

# If no placeholder is written: `all` puts every image before the first user's text, `one` does so for a single image.
Lead = Literal["all", "one"]

# They change what the model reads or learns; as metadata they would silently be ignored.
_UNSUPPORTED = ("tools", "chat_template_kwargs", "audio", "audios", "objects")
_FEEDBACK = ("label", "kto_tag")


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
        RecordError: ``placeholder_mismatch``, ``bad_conversation``, ``missing_field``, ``empty_response``,
            ``identical``, or see :func:`vlmpo.data.formats.media.media_of`.
    """
    turns = with_system(turns, record, context)
    if not turns or turns[-1].role != "user":
        what = f"ends with the {turns[-1].role}'s turn" if turns else "has no turn"
        raise context.error("bad_conversation", f"the prompt {what}; a response answers the user's")
    images, videos = media_of(record, "image", context), media_of(record, "video", context)
    texts = [turn.text for turn in turns]
    first_user = next(at for at, turn in enumerate(turns) if turn.role == "user")
    # Videos before images, so that the image comes first if both lead.
    videos = _placed(texts, [turn.videos for turn in turns], videos, "video", lead, first_user, context)
    images = _placed(texts, [turn.images for turn in turns], images, "image", lead, first_user, context)
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
        metadata={key: value for key, value in record.items() if key not in read and key not in MEDIA_KEYS},
    )


def refuse_unsupported(record: Mapping[str, Any], context: RecordContext) -> None:
    """Raise RecordError if a record of a conversation holds something that vlmpo cannot honour."""
    for key in _UNSUPPORTED:
        if not is_null(record.get(key)) and record[key] not in ("", "[]", "{}", [], {}):
            raise context.error("unsupported_field", f"`{key}` is not supported; take it or the record out")
    for key in _FEEDBACK:
        if record.get(key) is False:
            detail = f"`{key}` is false: a response marked as bad would be learnt; take the record out, or pair it"
            raise context.error("unpaired_feedback", detail)


def with_system(turns: Sequence[Turn], record: Mapping[str, Any], context: RecordContext) -> Sequence[Turn]:
    """Return ``turns`` after the record's ``system`` prompt, unless they begin with one."""
    if record.get("system") in (None, "") or (turns and turns[0].role == "system"):
        return turns
    return [text_turn("system", text_field(record, "system", context.origin)), *turns]


def _placed(
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
