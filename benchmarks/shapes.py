"""What the benchmark trains: a model, a processor and pairs of one shape, the same for every arm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmpo import Message, PreferencePair
from vlmpo.demo.tiny import CHAT_TEMPLATE, TinySize, build_model, build_processor, train_tokenizer

VISONLYQA = Path(__file__).resolve().parents[2] / "shared" / "data" / "visonlyqa"


@dataclass(frozen=True)
class Shape:
    """One shape of the benchmark.

    Attributes:
        name: as in the table.
        tiles: of each prompt's image, thumbnail included; 0: text only.
        vocabulary: entries of the vocabulary.
        image_size: side of a tile in pixels; patches of 14, one token for 2 x 2 of them.
        prompt_words, response_words: words in the prompt and range of those in a response; a word is about a token.
        pairs_a_step: pairs of an optimizer step.
        real: pairs of ``visonlyqa`` in place of made ones.
    """

    name: str
    tiles: int
    vocabulary: int = 8192
    image_size: int = 224
    prompt_words: int = 20
    response_words: tuple[int, int] = (101, 101)
    pairs_a_step: int = 2
    real: bool = False

    @property
    def size(self) -> TinySize:
        """An InternVL of 11 M parameters at a vocabulary of 8k."""
        return TinySize(
            image_size=self.image_size,
            patch_size=14,
            vision_hidden=192,
            vision_layers=6,
            vision_heads=6,
            text_hidden=256,
            text_layers=6,
            text_heads=8,
            text_kv_heads=4,
            max_tiles=12,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("1 tile", 1),
        Shape("7 tiles", 7),
        Shape("13 tiles", 13),
        Shape("text only", 0),
        Shape("7 tiles, vocabulary 151k", 7, vocabulary=151_936),
        Shape("7 tiles of 256 tokens", 7, image_size=448, response_words=(150, 300)),
        Shape("visonlyqa", 0, real=True),
    )
}


def words(random: np.random.Generator, count: int) -> str:
    """``count`` words of two letters."""
    return " ".join("".join(random.choice(list("abcdefghij"), size=2)) for _ in range(count))


def made_pairs(shape: Shape, prompts: int, pairs_a_prompt: int) -> list[PreferencePair]:
    """Pairs on noise images that the processor cuts into just ``shape.tiles`` tiles; those of a prompt in a row."""
    random = np.random.default_rng(0)
    across = {0: 0, 1: 1, 7: 6, 13: 12}[shape.tiles]  # more than one tile: a thumbnail joins
    found = []
    for _ in range(prompts):
        images: tuple[Any, ...] = ()
        question = words(random, shape.prompt_words)
        if across:
            pixels = random.integers(0, 255, (shape.image_size, shape.image_size * across, 3), dtype=np.uint8)
            images, question = (Image.fromarray(pixels),), "<image>\n" + question
        for _ in range(pairs_a_prompt):
            low, high = shape.response_words
            chosen, rejected = (words(random, int(random.integers(low, high + 1))) for _ in range(2))
            found.append(PreferencePair((Message("user", question),), images, chosen, rejected))
    return found


def real_pairs(prompts: int, pairs_a_prompt: int) -> list[PreferencePair]:
    """Pairs of ``visonlyqa`` with reasoning, ``pairs_a_prompt`` of each prompt that has so many."""
    from vlmpo.data.sources import open_pairs
    from vlmpo.data.specs import SourceSpec

    by_prompt: dict[Any, list[PreferencePair]] = {}
    data = open_pairs([SourceSpec(str(VISONLYQA / "meta.json"))])
    for index in range(len(data)):
        pair = data[index]
        by_prompt.setdefault((pair.prompt, pair.images), []).append(pair)
    enough = [pairs[:pairs_a_prompt] for pairs in by_prompt.values() if len(pairs) >= pairs_a_prompt]
    return [pair for pairs in enough[:prompts] for pair in pairs]


def make_pairs(shape: Shape, prompts: int, pairs_a_prompt: int = 1) -> list[PreferencePair]:
    """``prompts * pairs_a_prompt`` pairs of the shape, those of a prompt behind one another."""
    return real_pairs(prompts, pairs_a_prompt) if shape.real else made_pairs(shape, prompts, pairs_a_prompt)


def make_processor(shape: Shape, pairs: list[PreferencePair]) -> Any:
    """The shape's processor; its tokenizer is trained on the pairs and filled up to the vocabulary."""
    texts = [text for pair in pairs for text in (pair.prompt[0].text, pair.chosen, pair.rejected or "")]
    tokenizer = train_tokenizer(texts, vocab_size=2048 if shape.real else 400)
    tokenizer.add_tokens([f"<unused{number}>" for number in range(shape.vocabulary - len(tokenizer))])
    processor = build_processor(tokenizer, shape.size)
    # TRL scores what a template writes after the end of the turn; here that is nothing, so that all score alike.
    processor.chat_template = CHAT_TEMPLATE.replace("{{ '<|im_end|>\n' }}", "{{ '<|im_end|>' }}")
    assert processor.chat_template != CHAT_TEMPLATE
    return processor


def make_model(shape: Shape, processor: Any) -> Any:
    """The shape's model with the same random weights each time, float32."""
    return build_model(processor.tokenizer, shape.size)
