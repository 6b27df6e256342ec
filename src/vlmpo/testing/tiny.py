"""Builds a tiny InternVL with its tokenizer and processor: for the demo, the tests and the benchmarks.

The classes are those of transformers; only the sizes are small and the weights random. The model saves, reloads through
``AutoModelForImageTextToText`` and ``AutoProcessor``, and generates like any checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

EXTRA_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *EXTRA_TOKENS.values()]

# The turns of InternVL3's template: an image item is written as the context token and a newline.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinySize:
    """Holds the sizes of a tiny InternVL. ``image_size / patch_size`` must be even, for the pixel shuffle."""

    image_size: int = 28
    patch_size: int = 14
    vision_hidden: int = 32
    vision_layers: int = 1
    vision_heads: int = 2
    text_hidden: int = 32
    text_layers: int = 2
    text_heads: int = 2
    text_kv_heads: int = 1
    max_positions: int = 32768
    layer_scale: float = 0.1
    initializer_range: float = 0.02
    position_embedding_std: float = 0.0
    crop_to_patches: bool = True
    max_tiles: int = 6
    tie_word_embeddings: bool = False

    @property
    def tokens_per_tile(self) -> int:
        """Return the number of image tokens of a tile after the 2x2 pixel shuffle."""
        return (self.image_size // self.patch_size // 2) ** 2


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Qwen's turn tokens and InternVL's image tokens on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Special tokens come after the learned ones, as in Qwen: id 0 is then "!", an ordinary character.
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Name the end-of-turn, padding and image tokens of a raw tokenizer that has SPECIAL_TOKENS."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=EXTRA_TOKENS,
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, size: TinySize) -> Any:
    """Build the stock InternVLProcessor around ``tokenizer`` for tiles of ``size``."""
    tile = {"height": size.image_size, "width": size.image_size}
    image_processor = GotOcr2ImageProcessor(
        size=tile, crop_to_patches=size.crop_to_patches, min_patches=1, max_patches=size.max_tiles
    )
    return InternVLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=tile),
        image_seq_length=size.tokens_per_tile,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, size: TinySize, seed: int = 0) -> InternVLForConditionalGeneration:
    """Build a tiny InternVL with random weights, float32, for ``tokenizer``'s vocabulary."""
    eos, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.text_hidden,
        intermediate_size=4 * size.text_hidden,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        num_key_value_heads=size.text_kv_heads,
        max_position_embeddings=size.max_positions,
        initializer_range=size.initializer_range,
        tie_word_embeddings=size.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    vision = {
        "hidden_size": size.vision_hidden,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
        "intermediate_size": 4 * size.vision_hidden,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "layer_scale_init_value": size.layer_scale,
        "initializer_range": size.initializer_range,
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=size.tokens_per_tile,
        tie_word_embeddings=size.tie_word_embeddings,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    if size.position_embedding_std:
        with torch.no_grad():
            model.model.vision_tower.embeddings.position_embeddings.normal_(0.0, size.position_embedding_std)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = pad
    return model
