"""Builds the demo's model: an InternVL of 0.6 million weights, with a word-level tokenizer for the demo's sentences."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from vlmpo.demo.task import CELLS, IMAGE_PIXELS, KINDS, LARGEST_ANSWER, LINES
from vlmpo.testing.tiny import SPECIAL_TOKENS, TinySize, build_model, build_processor, wrap_tokenizer

UNKNOWN = "<unk>"

# Patches of 8 pixels, shuffled two by two: one image token a cell. InternVL's own layer scale (0.1), initializer range
# (0.02) and zero position embeddings suit a pretrained tower; in training from scratch they waste hundreds of steps.
DEMO_SIZE = TinySize(
    image_size=IMAGE_PIXELS,
    patch_size=8,
    vision_hidden=96,
    vision_layers=1,
    vision_heads=2,
    text_hidden=96,
    text_layers=3,
    text_heads=2,
    text_kv_heads=2,
    max_positions=1024,
    layer_scale=1.0,
    initializer_range=0.08,
    position_embedding_std=0.5,
    crop_to_patches=False,
    max_tiles=1,
)


def _words() -> list[str]:
    """Return every word of the task and of the chat template's turns, in a fixed order."""
    sentences = [
        "system user assistant",
        "Describe and Count in plus minus . + - = Final answer:",
        " ".join(str(number) for number in range(LARGEST_ANSWER + 1)),
        *CELLS,
        *KINDS,
        *(f"{line} {line}:" for line in LINES),
    ]
    return list(dict.fromkeys(word for sentence in sentences for word in sentence.split()))


def demo_tokenizer() -> Any:
    """Build a tokenizer with one token a word; the chat template's newlines are tokens too, spaces are not."""
    vocabulary = {word: index for index, word in enumerate([UNKNOWN, "\n", *_words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return wrap_tokenizer(tokenizer)


def demo_processor() -> Any:
    """Build the stock InternVL processor for one 48x48 tile, nine image tokens."""
    return build_processor(demo_tokenizer(), DEMO_SIZE)


def demo_model(processor: Any, seed: int) -> Any:
    """Build the model with random weights, float32."""
    return build_model(processor.tokenizer, DEMO_SIZE, seed)
