"""Tiny models, trees and pairs the tests share."""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image

from vlmpo.data.records import Message, PreferencePair
from vlmpo.testing.tiny import TinySize, build_model, build_processor, train_tokenizer
from vlmpo.tree.layout import PromptTree

SIZE = TinySize(image_size=56, initializer_range=0.2, position_embedding_std=0.2, max_tiles=2)

CORPUS = [
    "how many red shapes are in the picture? there are two red circles and a blue square.",
    "the answer is 3! what colour is it? the colour is green, not blue.",
    "Final answer: 7. look again at the first row: one, two, three.",
]


@functools.cache
def tokenizer():
    return train_tokenizer(CORPUS, vocab_size=384)


@functools.cache
def processor(size: TinySize = SIZE):
    return build_processor(tokenizer(), size)


def model(seed: int = 0, size: TinySize = SIZE, dtype: torch.dtype = torch.float32):
    return build_model(tokenizer(), size, seed).to(dtype)


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_tree(
    images: list[Image.Image], lengths: list[int], seed: int, dtype: torch.dtype = torch.float32
) -> PromptTree:
    """A prompt with ``images`` and a few words, and responses of random tokens of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": f"what is it {seed}?"}]
    text = processor().apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    encoded = processor()(images=images or None, text=text, return_tensors="pt")
    vision = {"pixel_values": encoded.pixel_values.to(dtype)} if images else {}
    responses = tuple(torch.randint(0, 300, (length,), generator=generator) for length in lengths)
    return PromptTree(encoded.input_ids[0], responses, vision)


WORDS = ("red", "blue", "green", "circle", "square", "two", "three", "seven", "not", "the", "picture", "row", "!")


def random_pair(seed: int, images: int = 1, source: str = "data", longest: int = 12) -> PreferencePair:
    """A pair with noise images and random words; chosen and rejected always differ."""
    random = np.random.default_rng(seed)

    def words() -> str:
        return " ".join(random.choice(WORDS, size=int(random.integers(1, longest))))

    chosen, rejected = words(), words()
    while rejected == chosen:
        rejected = words()
    question = "<image>\n" * images + f"what colour is it, {words()}?"
    return PreferencePair(
        prompt=(Message("user", question),),
        images=tuple(noise_image(40 + 8 * seed % 60, 50, 100 * seed + i) for i in range(images)),
        chosen=chosen,
        rejected=rejected,
        source=source,
        origin=f"memory:{seed}",
    )


def pairs_like_trl(images: list[Image.Image], responses: list[tuple[str, str]]):
    """A ``datasets.Dataset`` in TRL's format: an image, a question and two responses a record."""
    import datasets

    text = datasets.Value("string")
    turns = [{"role": text, "content": text}]
    features = {"images": datasets.List(datasets.Image()), "prompt": turns, "chosen": turns, "rejected": turns}
    records = [
        {
            "images": [image],
            "prompt": [{"role": "user", "content": "how many?"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for image, (chosen, rejected) in zip(images, responses, strict=True)
    ]
    return datasets.Dataset.from_list(records, features=datasets.Features(features))
