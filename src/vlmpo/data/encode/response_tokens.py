"""Tokenizes responses as continuations of their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Short, long, not ASCII, white space at either end and inside: what may merge with a prompt's last characters.
_PROBES = ("red", " Two  red\n\n\tshapes, 17. ", "\n", "\u00e0 la carte \u7ea2\u8272 \U0001f534", ":", "<")


@dataclass(frozen=True)
class ResponseTokenizer:
    """Tokenizes responses together with the prompt before them.

    Attributes:
        tokenizer: the model's tokenizer.
        fast: whether to call the Rust tokenizer itself, without offsets.
        seam: an added token, from the last of which a prompt is read. A tokenizer cuts a text at its added tokens
            before it does anything else, so the text before one changes nothing after it. A prompt without this token
            is read whole, as every prompt is if it is None.
    """

    tokenizer: Any
    fast: bool = False
    seam: str | None = None

    def __call__(self, prompt: str, responses: Sequence[str], add_special_tokens: bool) -> list[list[int] | None]:
        """Return each response's ids as they continue the prompt's; None if a token would span the two."""
        if self.seam is not None:
            prompt = "".join(prompt.rpartition(self.seam)[1:])
        texts = [prompt, *(prompt + response for response in responses)]
        if self.fast:
            backend = self.tokenizer.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            prompt_ids, *all_ids = (encoding.ids for encoding in encodings)
        else:
            settings = {"add_special_tokens": add_special_tokens, "truncation": False, "padding": False}
            prompt_ids, *all_ids = self.tokenizer(texts, **settings)["input_ids"]
        start = len(prompt_ids)
        return [ids[start:] if ids[:start] == prompt_ids else None for ids in all_ids]


def response_tokenizer(tokenizer: Any, prompt: str) -> ResponseTokenizer:
    """Return the fast ResponseTokenizer for prompts that end as ``prompt`` does.

    If its ids of a few probes differ from the plain one's, return the plain one.
    """
    plain = ResponseTokenizer(tokenizer)
    try:
        fast = ResponseTokenizer(tokenizer, fast=True, seam=_last_added_token(tokenizer, prompt))
        same = all(fast(prompt, _PROBES, adds) == plain(prompt, _PROBES, adds) for adds in (True, False))
    except Exception:  # no Rust tokenizer, or one without these methods
        return plain
    return fast if same else plain


def _last_added_token(tokenizer: Any, prompt: str) -> str | None:
    """Return the added token that starts last in ``prompt``, of those that are matched in any unchanged text."""
    added = tokenizer.added_tokens_decoder.values()
    matched = [token.content for token in added if not token.normalized and not token.single_word]
    return max(
        (token for token in matched if token in prompt),
        key=lambda token: (prompt.rfind(token), len(token)),
        default=None,
    )
