"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: one image, a grid of patches, a grid only where an image is alone."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.zoo import Family
from tests.zoo.words import finished, tokenizer, tower

PATCH = 14
SIDE = 28  # 2 x 2 patches a picture

# As published: all images of a message first, then its text; no token ends a turn.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As of the Mistral one: images and text of a turn where they stand, the end of a turn written.
NEXT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{{ ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'][0]['text'] + '</s>' }}"
    "{% else %}{{ m['content'][0]['text'] + '\n' }}{% endif %}{% endfor %}"
)
ONEVISION_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + c['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]


@functools.cache
def llava_tokens() -> Any:
    return tokenizer(["<image>"], bos="<s>", eos="</s>", pad="<pad>")


@functools.cache
def onevision_tokens() -> Any:
    special = ["<|im_start|>", "<image>", "<video>"]
    return tokenizer(special, bos=None, eos="<|im_end|>", pad="<|endoftext|>")


@functools.cache
def llava_processor() -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=llava_tokens(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


@functools.cache
def next_processor() -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=llava_tokens(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=NEXT_TEMPLATE,
    )


@functools.cache
def onevision_processor() -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    size = {"height": SIDE, "width": SIDE}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer=onevision_tokens(),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=ONEVISION_TEMPLATE,
    )


def vision(kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,  # features come from the last but one
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": 0.2,
        "initializer_factor": 5.0,
        "projection_dim": 32,
    }


def llava_model(seed: int) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokens = llava_tokens()
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision("clip_vision_model"),
        text_config={"model_type": "llama", **tower(tokens)},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    return finished(LlavaForConditionalGeneration(config), tokens)


def next_model(seed: int) -> Any:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    tokens = llava_tokens()
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=vision("clip_vision_model"),
        text_config={"model_type": "mistral", **tower(tokens), "sliding_window": None},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    return finished(LlavaNextForConditionalGeneration(config), tokens)


def onevision_model(seed: int) -> Any:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tokens = onevision_tokens()
    torch.manual_seed(seed)
    config = LlavaOnevisionConfig(
        vision_config=vision("siglip_vision_model"),
        text_config={"model_type": "qwen2", **tower(tokens)},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        video_token_id=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return finished(LlavaOnevisionForConditionalGeneration(config), tokens)


FAMILIES = [
    Family("llava-1.5", llava_processor, llava_model, shared=True),
    Family("llava-next", next_processor, next_model, shared=True),
    Family("llava-onevision", onevision_processor, onevision_model, shared=True),
]
