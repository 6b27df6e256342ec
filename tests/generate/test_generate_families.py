"""Greedy answers of every family through LocalEngine, token for token those of plain ``generate``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny_models import noise_image
from tests.zoo import FAMILIES, Family
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.encode.processors import tokenizer_of
from vlmpo.data.records import Message
from vlmpo.errors import RecordError
from vlmpo.generate.base import GenerationRequest, Sampling
from vlmpo.generate.local import LocalEngine
from vlmpo.models.families import support_for
from vlmpo.tree.forward import install

NEW = 6
IMAGES = (noise_image(112, 40, 1), noise_image(40, 100, 2))


def request(images: int, n: int = 1, prefix: str = "") -> GenerationRequest:
    text = "<image>\n" * images + "what colour is it?"
    return GenerationRequest((Message("user", text),), IMAGES[:images], n=n, seed=3, prefix=prefix, origin="q.jsonl:1")


def plainly(family: Family, model: Any, images: int, prefix: str = "") -> str:
    """What the model says by its own processor and ``generate`` alone."""
    own = family.processor()
    tokens = tokenizer_of(own)
    content: Any = [*({"type": "image", "image": image} for image in IMAGES[:images])]
    content = [*content, {"type": "text", "text": "what colour is it?"}] if family.images else "what colour is it?"
    text = own.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    if family.images:
        starts = tokens.bos_token is not None and text.startswith(tokens.bos_token)
        given = {"images": [list(IMAGES[:images])]} if images else {}
        inputs = own(text=[text], **given, add_special_tokens=not starts, return_tensors="pt")
    else:
        inputs = own([text], add_special_tokens=False, return_tensors="pt")
    banned = sorted(PairEncoder(own).media_ids) or None
    ends = [model.generation_config.eos_token_id, tokens.eos_token_id]
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, suppress_tokens=banned, eos_token_id=ends)
    return tokens.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("installed", [False, True], ids=["plain", "installed"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_greedy_answers_are_those_of_plain_generate(family: Family, installed: bool) -> None:
    """Of the model as it is, and as it is while it trains, with the attention for responses installed."""
    model, plain = family.model(0), family.model(0)
    if installed:
        install(model, support_for(model.config).shared)
    tiles = 2 if "internvl" in family.name else 12
    engine = LocalEngine(model, family.processor(), Sampling(temperature=0.0, max_new_tokens=NEW), max_tiles=tiles)
    counts = [0, 1] if family.images else [0]
    answers = engine.generate([request(images) for images in counts])
    texts = [answer.text for (answer,) in answers]
    assert texts == [plainly(family, plain, images) for images in counts]
    assert all(texts)  # an empty answer would prove nothing


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.images], ids=lambda family: family.name)
def test_several_samples_of_two_images(family: Family) -> None:
    """Every sample reads the prompt's images: one asked alone is the first of several."""
    engine = LocalEngine(family.model(0), family.processor(), Sampling(temperature=1.0, max_new_tokens=NEW))
    ((one,), several) = engine.generate([request(2, n=1), request(2, n=3)])
    assert several[0] == one
    assert len({answer.text for answer in several}) > 1


def test_a_question_with_an_image_to_a_text_only_model_is_told_and_left_out() -> None:
    family = FAMILIES["llama-text"]
    engine = LocalEngine(family.model(0), family.processor(), Sampling(temperature=0.0, max_new_tokens=NEW))
    bad, answers = engine.generate([request(1), request(0)])
    assert isinstance(answers, list)
    assert len(answers) == 1
    assert isinstance(bad, RecordError)
    assert bad.reason == "images_unsupported"
    assert str(bad).startswith("q.jsonl:1: the record has images, and ")
