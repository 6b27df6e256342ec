"""Tokens of replies, as they continue the tokens of their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Short, long, not ASCII, white space at either end and inside: what may grow together with a prompt's last characters.
_PROBES = ("red", " Two  red\n\n\tshapes, 17. ", "\n", "\u00e0 la carte \u7ea2\u8272 \U0001f534", ":", "<")


class ReplyReader:
    """Reads replies with their prompt before them, all of it, through the tokenizer as transformers has it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, prompt: str, replies: Sequence[str], adds_special_tokens: bool) -> list[list[int] | None]:
        """Ids of each reply as they continue the prompt's; None where a token would span the seam."""
        before, *joint = self._ids([prompt, *(prompt + reply for reply in replies)], adds_special_tokens)
        return [ids[len(before) :] if ids[: len(before)] == before else None for ids in joint]

    def _ids(self, texts: list[str], adds_special_tokens: bool) -> list[list[int]]:
        settings = {"add_special_tokens": adds_special_tokens, "truncation": False, "padding": False}
        ids: list[list[int]] = self._tokenizer(texts, **settings)["input_ids"]
        return ids


class QuickReplyReader(ReplyReader):
    """Reads replies after the end of their prompt alone, from the last ``seam`` on; notes no token's place in the text.

    A tokenizer cuts a text at its added tokens before it does anything else: what follows one is read the same whatever
    stands before it. Without a ``seam``, or in a prompt that does not hold it, the prompt is read whole.
    """

    def __init__(self, tokenizer: Any, seam: str | None) -> None:
        super().__init__(tokenizer)
        self._seam = seam

    def __call__(self, prompt: str, replies: Sequence[str], adds_special_tokens: bool) -> list[list[int] | None]:
        end = "".join(prompt.rpartition(self._seam)[1:]) if self._seam else prompt
        return super().__call__(end, replies, adds_special_tokens)

    def _ids(self, texts: list[str], adds_special_tokens: bool) -> list[list[int]]:
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return [read.ids for read in backend.encode_batch_fast(texts, add_special_tokens=adds_special_tokens)]


def quick_reader(tokenizer: Any, prompt: str) -> ReplyReader:
    """The quick reader for prompts that end as ``prompt`` does; the plain one where it does not do the same."""
    plain = ReplyReader(tokenizer)
    try:
        quick = QuickReplyReader(tokenizer, _last_added_token(tokenizer, prompt))
        alike = all(quick(prompt, _PROBES, adds) == plain(prompt, _PROBES, adds) for adds in (True, False))
    except Exception:  # no backend, or none of these methods
        return plain
    return quick if alike else plain


def _last_added_token(tokenizer: Any, prompt: str) -> str | None:
    """The added token that starts last in ``prompt``, of those that are sought in the text as it is written."""
    added = tokenizer.added_tokens_decoder.values()
    found = [
        token.content for token in added if not (token.normalized or token.single_word) and token.content in prompt
    ]
    return max(found, key=lambda token: (prompt.rfind(token), len(token)), default=None)
