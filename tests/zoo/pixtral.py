"""Pixtral (LLaVA around a Pixtral tower) and Mistral 3: images keep their own shapes, read as one run of patches."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.zoo import Family
from tests.zoo.words import finished, tokenizer, tower

PATCH = 14
LONGEST = 56
MERGE = 2  # Mistral 3 folds 2 x 2 patches into a token

TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + m['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST]' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '[IMG]' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '[/INST]' }}"
    "{% else %}{{ m['content'][0]['text'] + '</s>' }}{% endif %}{% endfor %}"
)


@functools.cache
def tokens() -> Any:
    special = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    return tokenizer(special, bos="<s>", eos="</s>", pad="<pad>")


@functools.cache
def processor(merge: int) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    return PixtralProcessor(
        image_processor=PixtralImageProcessor(patch_size=PATCH, size={"longest_edge": LONGEST}),
        tokenizer=tokens(),
        patch_size=PATCH,
        spatial_merge_size=merge,
        chat_template=TEMPLATE,
    )


def sizes() -> dict[str, Any]:
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": LONGEST,
        "patch_size": PATCH,
        "initializer_range": 0.2,
    }
    return {
        "vision_config": vision,
        "text_config": {"model_type": "mistral", **tower(tokens()), "sliding_window": None},
        "image_token_id": tokens().convert_tokens_to_ids("[IMG]"),
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    }


def pixtral_model(seed: int) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    config = LlavaConfig(**sizes(), vision_feature_select_strategy="full")
    return finished(LlavaForConditionalGeneration(config), tokens())


def mistral_model(seed: int) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(seed)
    config = Mistral3Config(**sizes(), spatial_merge_size=MERGE)
    return finished(Mistral3ForConditionalGeneration(config), tokens())


FAMILIES = [
    Family("pixtral", functools.partial(processor, 1), pixtral_model, shared=True),
    Family(
        "mistral3",
        functools.partial(processor, MERGE),
        mistral_model,
        shared=True,
        note="an image of one token, alone in its prompt, is refused: transformers fails on it",
    ),
]
