"""Knows a model's control tokens: they mark turns, begin and end texts, or stand for media, so no text may hold one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vlmpo.data.encode.processors import media_ids, tokenizer_of

_BRACKETED = re.compile(r"[<\[\u25c1].*[>\]\u25b7]", re.DOTALL)  # <|im_start|>, [INST], a thought mark of triangles
_TILE = re.compile(r"<\|?(?:row_\d+_col_\d+|tile_[xy]_separator)\|?>")  # written by processors before and between tiles
_LETTERS = re.compile(r"[^a-z]")


@dataclass(frozen=True)
class ControlTokens:
    """Holds the control tokens of one model.

    Attributes:
        ids: of all of them.
        media: those that stand for an image, video or sound, or frame one.
        pattern: matches any of them in a text.
    """

    ids: frozenset[int]
    media: frozenset[str]
    pattern: re.Pattern[str]

    def find(self, text: str) -> str | None:
        """Return the first control token in ``text``; None if there is none."""
        found = self.pattern.search(text)
        return None if found is None else found.group()


def control_tokens(processor: Any, written: str) -> ControlTokens:
    """Return the control tokens of the model that ``processor`` belongs to.

    They are the tokens of its own that its template writes around conversations; those that begin, end and pad texts;
    and those of media. Any other special token (of grounding, of tool calls) may be part of an answer, and so may the
    marks of a thought, whoever opens it.

    Args:
        processor: of the model.
        written: all that the template writes around texts of every role.
    """
    tokenizer = tokenizer_of(processor)
    tiles = {token for token in special_tokens(tokenizer) if _TILE.fullmatch(token)}
    media = tiles | set(map(str, tokenizer.convert_ids_to_tokens(sorted(media_ids(processor)))))
    named = {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if token}
    # One that is no mark may be a word or a newline, which a model happens to pad with or to end with.
    words = {token for token in named if not _BRACKETED.fullmatch(token)}
    of_template = {token for token in any_of(own_tokens(tokenizer)).findall(written) if not _marks_thought(token)}
    tokens = media | ((of_template | named) - words)
    ids = (tokenizer.convert_tokens_to_ids(token) for token in tokens)
    known = frozenset(token_id for token_id in ids if token_id is not None and token_id != tokenizer.unk_token_id)
    return ControlTokens(known | media_ids(processor), frozenset(media), any_of(tokens))


def own_tokens(tokenizer: Any) -> set[str]:
    """Return the special tokens of ``tokenizer``, and what it has added in the form of one: <|User|>, not a newline."""
    return special_tokens(tokenizer) | {
        token.content for token in _added(tokenizer) if not token.special and _BRACKETED.fullmatch(token.content)
    }


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the special tokens of ``tokenizer``."""
    return {*map(str, tokenizer.all_special_tokens), *(token.content for token in _added(tokenizer) if token.special)}


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of ``tokens``, the longest first; nothing if there are none."""
    longest_first = sorted(filter(None, tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _added(tokenizer: Any) -> Iterable[Any]:
    return getattr(tokenizer, "added_tokens_decoder", {}).values()


def _marks_thought(token: str) -> bool:
    """Return whether ``token`` begins or ends a thought: <think>, </think>, [THINK], <|begin_of_thought|>."""
    letters = _LETTERS.sub("", token.lower())
    return "think" in letters or "thought" in letters
