"""Tokens of a prompt whose images have become long runs of one token: a run is read as one token, then written out.

A tile is 256 equal tokens in the text that InternVL's processor hands to its tokenizer, a prompt of 13 tiles 3,328; to
find each of them anew is a third of a loader's work on such a prompt. Image tokens are added tokens: a tokenizer cuts a
text at them before it does anything else, so how many stand side by side changes nothing around them.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.encode.processors import image_token_id, reads_images


class RunTokenizer:
    """A tokenizer in every respect, quicker on runs of ``token``. What it is not sure of, the tokenizer itself does."""

    def __init__(self, tokenizer: Any, token_id: int) -> None:
        self._tokenizer = tokenizer
        self._token_id = token_id
        self._token = str(tokenizer.convert_ids_to_tokens(token_id))
        self._run = re.compile(f"(?:{re.escape(self._token)})+")

    def __getattr__(self, name: str) -> Any:
        if name == "_tokenizer":  # asked while it is unpickled, before it has any attribute
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any = None, *args: Any, **settings: Any) -> Any:
        found = None if args else self._read(text, settings)
        return self._tokenizer(text, *args, **settings) if found is None else found

    def _read(self, text: Any, settings: dict[str, Any]) -> Any:
        """The encoding of one text that is neither padded nor cut; None for anything else, or where no run is found."""
        from transformers import BatchEncoding

        if not isinstance(text, list) or len(text) != 1 or settings.get("padding") or settings.get("truncation"):
            return None
        lengths: list[int] = []

        def note(run: re.Match[str]) -> str:
            lengths.append(len(run[0]) // len(self._token))
            return self._token

        short = self._run.sub(note, text[0])
        if not lengths:
            return None
        encoded = self._tokenizer([short], **{**settings, "return_tensors": None})
        read = {name: np.asarray(values) for name, values in encoded.items()}  # [1, tokens] each
        ids = read["input_ids"]
        at = np.flatnonzero(ids == self._token_id)
        if len(at) != len(lengths) or any(values.shape != ids.shape for values in read.values()):
            return None
        times: NDArray[np.int64] = np.ones(ids.size, dtype=np.int64)
        times[at] = lengths
        kind = settings.get("return_tensors")
        written = {name: np.repeat(values, times, axis=1) for name, values in read.items()}
        if kind is None:
            return BatchEncoding({name: values.tolist() for name, values in written.items()})
        return BatchEncoding(written, tensor_type=kind)


def with_quick_runs(processor: Any) -> Any:
    """``processor`` with a RunTokenizer in place of its tokenizer; it itself where it has no image token."""
    token_id = image_token_id(processor)
    if not reads_images(processor) or token_id is None:
        return processor
    quick = copy.copy(processor)
    quick.tokenizer = RunTokenizer(processor.tokenizer, token_id)
    return quick
