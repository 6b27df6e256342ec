"""InternVL3's sizes with random weights, pairs of a shape, and the operations they cost."""

from __future__ import annotations

import functools
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
class Flops:
    """Floating-point operations of a forward; a multiplication and an addition count as two."""

    products: int
    attention: int

    @property
    def total(self) -> int:
        """Return the sum of both."""
        return self.products + self.attention


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

    @property
    def image(self) -> tuple[int, int]:
        """Return height and width of an image of ``tiles`` tiles: more than one, and a thumbnail joins."""
        return self.image_size, self.image_size * max(1, self.tiles - 1)

    def processor(self) -> Any:
        """Return the processor."""
        tiles = TinySize(image_size=self.image_size, patch_size=self.patch_size, max_tiles=max(1, self.tiles - 1))
        return build_processor(make_tokenizer(), tiles)

    def config(self, tokenizer: Any) -> Any:
        """Return the model's config."""
        from transformers import InternVLConfig, Qwen2Config

        text = Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.text_hidden,
            intermediate_size=self.text_mlp,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_heads,
            num_key_value_heads=self.text_kv_heads,
            max_position_embeddings=32_768,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        vision = {
            "hidden_size": self.vision_hidden,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            "intermediate_size": self.vision_mlp,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
        }
        return InternVLConfig(
            vision_config=vision,
            text_config=text.to_dict(),
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=self.tokens_per_tile,
            tie_word_embeddings=False,
        )

    def flops(self, prompt: int, responses: Sequence[int]) -> Flops:
        """Return the operations of a forward, see :func:`forward_flops`."""
        vision, text = self.vision_hidden, self.text_hidden
        patches = (self.image_size // self.patch_size) ** 2
        seen = self.tiles * (patches + 1)  # with the class token
        products = 2 * self.tiles * patches * 3 * self.patch_size**2 * vision
        products += 2 * seen * self.vision_layers * (4 * vision**2 + 2 * vision * self.vision_mlp)
        products += 2 * self.tiles * self.tokens_per_tile * (4 * vision * text + text**2)  # the projector
        keys = text // self.text_heads * self.text_kv_heads
        layer = 2 * text**2 + 2 * text * keys + 3 * text * self.text_mlp
        products += 2 * (prompt + sum(responses)) * self.text_layers * layer
        products += 2 * sum(responses) * self.vocabulary * text
        attention = 4 * self.vision_layers * self.tiles * (patches + 1) ** 2 * vision
        return Flops(products, attention + 4 * self.text_layers * pairs_seen(prompt, responses) * text)


INTERNVL3_1B = VlmSize("InternVL3-1B", 896, 24, 14, 2, 4864)
INTERNVL3_8B = VlmSize("InternVL3-8B", 3584, 28, 28, 4, 18_944)
MINIATURE = VlmSize("miniature", 32, 2, 4, 2, 64, 1000, 32, 2, 2, 64, 56, 14, 3, 5, (8, 15))


@functools.cache
def make_pairs(size: Any, prompts: int, pairs_a_prompt: int = 1) -> list[PreferencePair]:
    """Return pairs on noise images of ``size.image`` pixels; those of a prompt are consecutive. Made once."""
    random = np.random.default_rng(0)
    pairs = []
    for _ in range(prompts):
        image = Image.fromarray(random.integers(0, 255, (*size.image, 3), dtype=np.uint8))
        # TRL's data set keeps images as files in memory: this format costs next to nothing to write and to read.
        image.format = "BMP"
        prompt = (Message("user", "<image>\n" + words(random, size.prompt_words)),)
        for _ in range(pairs_a_prompt):
            low, high = size.response_words
            chosen, rejected = (words(random, int(random.integers(low, high + 1))) for _ in range(2))
            pairs.append(PreferencePair(prompt, (image,), chosen, rejected))
    return pairs


def make_tokenizer() -> Any:
    """Return a tokenizer with a token for each word of the pairs."""
    every = " ".join("".join(pair) for pair in itertools.product("abcdefghij", repeat=2))
    return train_tokenizer([every] * 4, vocab_size=600)


@functools.cache
def make_processor(size: Any) -> Any:
    """Return the processor of a size. Made once."""
    return size.processor()


def make_model(size: Any, processor: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a model with the same random weights each time, made on ``device``."""
    from transformers import AutoModelForImageTextToText

    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(size.config(tokenizer), dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def pairs_seen(prompt: int, responses: Sequence[int]) -> int:
    """Return how many pairs of a query and a key that it sees there are in a tree."""
    return prompt * (prompt + 1) // 2 + sum(length * prompt + length * (length + 1) // 2 for length in responses)


def forward_flops(size: Any, prompt: int, responses: Sequence[int]) -> Flops:
    """Return the operations of a forward of one prompt, each token read once, with logits of the scored tokens only.

    A weight matrix of n entries costs 2 n a token. Attention costs 4 x width a layer for each query and each key that
    it sees: neither masked halves nor anything that is read twice is counted.

    Args:
        size: of the model and the prompt's image.
        prompt: tokens of the prompt, image tokens included.
        responses: tokens of each response.
    """
    flops: Flops = size.flops(prompt, responses)
    return flops


def peak_flops(device_name: str) -> float | None:
    """Return the peak assumed for a device; None if it is not listed."""
    return next((peak for name, peak in PEAK.items() if name in device_name and "PCIe" not in device_name), None)
