"""Idefics3 and SmolVLM: an image is split into tiles, beside the whole; the pictures of a prompt are one list."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.zoo import Family
from tests.zoo.words import finished, tokenizer, tower

PATCH = 7
SIDE = 28  # 4 x 4 patches a picture, shuffled to 2 x 2 tokens
SCALE = 2
TOKENS = (SIDE // PATCH) ** 2 // SCALE**2
MEDIA = ["<fake_token_around_image>", "<image>", "<global-img>"]
ROWS = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]

TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@functools.cache
def tokens() -> Any:
    special = ["<|im_start|>", *MEDIA, *ROWS]
    return tokenizer(special, bos=None, eos="<end_of_utterance>", pad="<|endoftext|>")


def splitting() -> dict[str, Any]:
    """Sizes at which the tests' images are split in up to 2 x 2."""
    return {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}


@functools.cache
def idefics_processor() -> Any:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    return Idefics3Processor(
        image_processor=Idefics3ImageProcessor(**splitting()),
        tokenizer=tokens(),
        image_seq_len=TOKENS,
        chat_template=TEMPLATE,
    )


@functools.cache
def smolvlm_processor() -> Any:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**splitting()),
        tokenizer=tokens(),
        video_processor=SmolVLMVideoProcessor(**splitting()),
        image_seq_len=TOKENS,
        chat_template=TEMPLATE,
    )


def sizes() -> dict[str, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": 0.2,
    }
    return {
        "vision_config": vision,
        "text_config": {"model_type": "llama", **tower(tokens())},
        "image_token_id": tokens().convert_tokens_to_ids("<image>"),
        "scale_factor": SCALE,
        "tie_word_embeddings": False,
        "pad_token_id": tokens().pad_token_id,
    }


def idefics_model(seed: int) -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    torch.manual_seed(seed)
    return finished(Idefics3ForConditionalGeneration(Idefics3Config(**sizes())), tokens())


def smolvlm_model(seed: int) -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    torch.manual_seed(seed)
    return finished(SmolVLMForConditionalGeneration(SmolVLMConfig(**sizes())), tokens())


FAMILIES = [
    Family("idefics3", idefics_processor, idefics_model, shared=True),
    Family("smolvlm", smolvlm_processor, smolvlm_model, shared=True),
]
