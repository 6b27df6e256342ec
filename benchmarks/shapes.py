"""Makes the model, the processor and the pairs of each shape, the same for every arm."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmpo.data.dataset import open_pairs
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.testing.tiny import CHAT_TEMPLATE, TinySize, build_model, build_processor, train_tokenizer

VISONLYQA = Path(__file__).resolve().parents[2] / "shared" / "data" / "visonlyqa"


@dataclass(frozen=True)
class Shape:
    """One shape of the benchmark.

    Attributes:
        name: name of the shape in the table.
        tiles: number of tiles of each prompt's image, thumbnail included; 0 for text only.
        vocabulary: number of entries of the vocabulary.
        image_size: pixels of a tile's edge; patches are 14 pixels wide, 2 x 2 of them a token.
        prompt_words, response_words: words in the prompt and range of those in a response; a word is about a token.
        pairs_a_step: number of pairs in an optimizer step.
        real: whether the pairs are those of ``visonlyqa``, instead of made ones.
        steps: number of steps in each turn of an arm; 1 if a step of the slowest arm takes many seconds.
    """

    name: str
    tiles: int
    vocabulary: int = 8192
    image_size: int = 224
    prompt_words: int = 20
    response_words: tuple[int, int] = (101, 101)
    pairs_a_step: int = 2
    real: bool = False
    steps: int = 2

    @property
    def size(self) -> TinySize:
        """Return the size of an InternVL with 11 M parameters at a vocabulary of 8k."""
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
        Shape("7 tiles", 7, steps=3),
        Shape("13 tiles", 13, steps=1),
        Shape("text only", 0),
        Shape("7 tiles, vocabulary 151k", 7, vocabulary=151_936, steps=1),
        Shape("7 tiles of 256 tokens", 7, image_size=448, response_words=(150, 300), steps=1),
        Shape("visonlyqa", 0, real=True),
    )
}


def words(random: np.random.Generator, count: int) -> str:
    """Return ``count`` words of two letters, about a token each."""
    return " ".join("".join(random.choice(list("abcdefghij"), size=2)) for _ in range(count))


def made_records(shape: Shape, folder: Path, prompts: int, pairs_a_prompt: int) -> list[dict[str, Any]]:
    """Return MMPR records on noise images of exactly ``shape.tiles`` tiles; write the images to ``folder``."""
    random = np.random.default_rng(0)
    across = {0: 0, 1: 1, 7: 6, 13: 12}[shape.tiles]  # more than one tile: a thumbnail joins
    records = []
    for number in range(prompts):
        question, image = words(random, shape.prompt_words), {}
        if across:
            pixels = random.integers(0, 255, (shape.image_size, shape.image_size * across, 3), dtype=np.uint8)
            image = {"image": f"{number}.png"}
            Image.fromarray(pixels).save(folder / image["image"], compress_level=1)
            question = "<image>\n" + question
        for _ in range(pairs_a_prompt):
            low, high = shape.response_words
            chosen, rejected = (words(random, int(random.integers(low, high + 1))) for _ in range(2))
            records.append({**image, "question": question, "chosen": chosen, "rejected": rejected})
    return records


def real_records(prompts: int, pairs_a_prompt: int) -> list[dict[str, Any]]:
    """Return records of ``visonlyqa``, ``pairs_a_prompt`` of each of the first ``prompts`` prompts with that many."""
    by_prompt: dict[Any, list[dict[str, Any]]] = {}
    data = open_pairs([SourceSpec(str(VISONLYQA / "meta.json"))])
    for index in range(len(data)):
        pair = data[index]
        record: dict[str, Any] = {"question": pair.prompt[0].text, "chosen": pair.chosen, "rejected": pair.rejected}
        record["image"] = list(pair.images) if len(pair.images) > 1 else pair.images[0]
        by_prompt.setdefault((pair.prompt, pair.images), []).append(record)
    enough = [records[:pairs_a_prompt] for records in by_prompt.values() if len(records) >= pairs_a_prompt]
    return [record for records in enough[:prompts] for record in records]


def make_data(shape: Shape, folder: Path, prompts: int, pairs_a_prompt: int = 1) -> Any:
    """Return ``prompts * pairs_a_prompt`` pairs of the shape, those of a prompt consecutive, as a data set on disk.

    The first call writes it to ``folder``; later calls with the same numbers read it.
    """
    folder = folder / f"data-{pairs_a_prompt}"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        made = real_records(prompts, pairs_a_prompt) if shape.real else None
        records = made_records(shape, folder, prompts, pairs_a_prompt) if made is None else made
        (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_pairs([SourceSpec(str(folder / "pairs.jsonl"), image_root=str(folder))])


def make_processor(shape: Shape, pairs: Any) -> Any:
    """Return the shape's processor, its tokenizer trained on the pairs and filled up to the vocabulary."""
    each = [pairs[index] for index in range(len(pairs))]
    texts = [text for pair in each for text in (pair.prompt[0].text, pair.chosen, pair.rejected or "")]
    tokenizer = train_tokenizer(texts, vocab_size=2048 if shape.real else 400)
    tokenizer.add_tokens([f"<unused{number}>" for number in range(shape.vocabulary - len(tokenizer))])
    processor = build_processor(tokenizer, shape.size)
    # TRL scores what a template writes after the end of the turn; here that is nothing, so all arms score the same.
    processor.chat_template = CHAT_TEMPLATE.replace("{{ '<|im_end|>\n' }}", "{{ '<|im_end|>' }}")
    assert processor.chat_template != CHAT_TEMPLATE
    return processor


def make_checkpoint(shape: Shape, folder: Path, prompts: int) -> str:
    """Return a folder with the shape's model, random float32 weights, and its processor; the first call writes it."""
    folder = folder / "model"
    if not folder.is_dir():
        processor = make_processor(shape, make_data(shape, folder.parent, prompts))
        build_model(processor.tokenizer, shape.size).save_pretrained(folder)
        processor.save_pretrained(folder)
    return str(folder)
