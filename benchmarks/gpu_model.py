"""InternVL3's sizes with random weights, pairs of a shape, and the operations they cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.shapes import words
from vlmpo import Message, PreferencePair
from vlmpo.testing.tiny import TinySize, build_processor, train_tokenizer

# Dense bf16 without sparsity, from the makers' data sheets, in FLOP/s. H100 PCIe is another card with a lower peak.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class VlmSize:
    """An InternVL3: InternViT and a Qwen2.5 text tower; prompts of ``tiles`` tiles and a few words."""

    name: str
    text_hidden: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    text_mlp: int
    vocabulary: int = 151_674
    vision_hidden: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    vision_mlp: int = 4096
    image_size: int = 448
    patch_size: int = 14
    tiles: int = 7
    prompt_words: int = 20
    response_words: tuple[int, int] = (150, 300)

    @property
    def tokens_per_tile(self) -> int:
        """Return the image tokens of a tile in the prompt."""
        return (self.image_size // self.patch_size // 2) ** 2


INTERNVL3_1B = VlmSize("InternVL3-1B", 896, 24, 14, 2, 4864)
INTERNVL3_8B = VlmSize("InternVL3-8B", 3584, 28, 28, 4, 18_944)
MINIATURE = VlmSize("miniature", 32, 2, 4, 2, 64, 1000, 32, 2, 2, 64, 56, 14, 3, 5, (8, 15))


def make_pairs(size: VlmSize, prompts: int, pairs_a_prompt: int = 1) -> list[PreferencePair]:
    """Return pairs on noise images of exactly ``size.tiles`` tiles; those of a prompt are consecutive."""
    random = np.random.default_rng(0)
    pairs = []
    for _ in range(prompts):
        across = size.image_size * max(1, size.tiles - 1)  # more than one tile: a thumbnail joins
        image = Image.fromarray(random.integers(0, 255, (size.image_size, across, 3), dtype=np.uint8))
        prompt = (Message("user", "<image>\n" + words(random, size.prompt_words)),)
        for _ in range(pairs_a_prompt):
            low, high = size.response_words
            chosen, rejected = (words(random, int(random.integers(low, high + 1))) for _ in range(2))
            pairs.append(PreferencePair(prompt, (image,), chosen, rejected))
    return pairs


def make_processor(size: VlmSize) -> Any:
    """Return the processor of a size, its tokenizer with a token for each word of the pairs."""
    every = " ".join("".join(pair) for pair in itertools.product("abcdefghij", repeat=2))
    tokenizer = train_tokenizer([every] * 4, vocab_size=600)
    tiles = TinySize(image_size=size.image_size, patch_size=size.patch_size, max_tiles=max(1, size.tiles - 1))
    return build_processor(tokenizer, tiles)


def make_model(size: VlmSize, processor: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a model with the same random weights each time, made on ``device``."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

    tokenizer = processor.tokenizer
    eos, pad, image = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<IMG_CONTEXT>"])
    text = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.text_hidden,
        intermediate_size=size.text_mlp,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        num_key_value_heads=size.text_kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    vision = {
        "hidden_size": size.vision_hidden,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
        "intermediate_size": size.vision_mlp,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=image,
        image_seq_length=size.tokens_per_tile,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = InternVLForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, pad
    return model


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward; a multiplication and an addition count as two."""

    products: int
    attention: int

    @property
    def total(self) -> int:
        """Return the sum of both."""
        return self.products + self.attention


def forward_flops(size: VlmSize, prompt: int, responses: Sequence[int]) -> Flops:
    """Return the operations of a forward of one prompt, each token read once, with logits of the scored tokens only.

    A weight matrix of n entries costs 2 n a token. Attention costs 4 x width a layer for each query and each key that
    it sees: neither masked halves nor anything that is read twice is counted.

    Args:
        prompt: tokens of the prompt, image tokens included.
        responses: tokens of each response.
    """
    vision, text = size.vision_hidden, size.text_hidden
    patches = (size.image_size // size.patch_size) ** 2
    seen = size.tiles * (patches + 1)  # with the class token
    products = 2 * size.tiles * patches * 3 * size.patch_size**2 * vision
    products += 2 * seen * size.vision_layers * (4 * vision**2 + 2 * vision * size.vision_mlp)
    products += 2 * size.tiles * size.tokens_per_tile * (4 * vision * text + text**2)  # the projector
    keys = text // size.text_heads * size.text_kv_heads
    layer = 2 * text**2 + 2 * text * keys + 3 * text * size.text_mlp
    products += 2 * (prompt + sum(responses)) * size.text_layers * layer
    products += 2 * sum(responses) * size.vocabulary * text
    attention = 4 * size.vision_layers * size.tiles * (patches + 1) ** 2 * vision
    pairs = prompt * (prompt + 1) // 2 + sum(length * prompt + length * (length + 1) // 2 for length in responses)
    return Flops(products, attention + 4 * size.text_layers * pairs * text)


def peak_flops(device_name: str) -> float | None:
    """Return the peak assumed for a device; None if it is not listed."""
    return next((peak for name, peak in PEAK.items() if name in device_name and "PCIe" not in device_name), None)
