"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions in three dimensions."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.zoo import Family
from tests.zoo.words import finished, tokenizer, tower

MEDIA = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@functools.cache
def tokens() -> Any:
    return tokenizer(["<|im_start|>", *MEDIA], bos=None, eos="<|im_end|>", pad="<|endoftext|>")


@functools.cache
def processor(kind: str) -> Any:
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    built: Any = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[kind]
    return built(
        image_processor=Qwen2VLImageProcessor(patch_size=14, min_pixels=56 * 56, max_pixels=4 * 56 * 56),
        tokenizer=tokens(),
        video_processor=Qwen3VLVideoProcessor() if kind == "qwen3_vl" else Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )


def _ids() -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return dict(zip(names, tokens().convert_tokens_to_ids(MEDIA), strict=True))


def _text(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    return tower(tokens(), rope_parameters=rope, **changes)


def qwen2_vl(seed: int) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 14}
    torch.manual_seed(seed)
    config = Qwen2VLConfig(text_config=_text(), vision_config=vision, tie_word_embeddings=False, **_ids())
    return finished(Qwen2VLForConditionalGeneration(config), tokens())


def qwen2_5_vl(seed: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(text_config=_text(), vision_config=vision, tie_word_embeddings=False, **_ids())
    return finished(Qwen2_5_VLForConditionalGeneration(config), tokens())


QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
    "num_position_embeddings": 16,
}


def qwen3_vl(seed: int) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {**QWEN3_VISION, "deepstack_visual_indexes": [0]}
    torch.manual_seed(seed)
    config = Qwen3VLConfig(text_config=_text(), vision_config=vision, tie_word_embeddings=False, **_ids())
    return finished(Qwen3VLForConditionalGeneration(config), tokens())


def qwen3_vl_moe(seed: int) -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    vision = {**QWEN3_VISION, "deepstack_visual_indexes": [0]}
    text = _text(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    torch.manual_seed(seed)
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_ids())
    return finished(Qwen3VLMoeForConditionalGeneration(config), tokens())


def qwen3_5(seed: int) -> Any:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = _text(
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
        partial_rotary_factor=1.0,
    )
    torch.manual_seed(seed)
    config = Qwen3_5Config(text_config=text, vision_config=QWEN3_VISION, tie_word_embeddings=False, **_ids())
    return finished(Qwen3_5ForConditionalGeneration(config), tokens())


FAMILIES = [
    *(
        Family(name, functools.partial(processor, kind), model, shared=True, note="positions in three dimensions")
        for name, kind, model in (
            ("qwen2-vl", "qwen2_vl", qwen2_vl),
            ("qwen2.5-vl", "qwen2_5_vl", qwen2_5_vl),
            ("qwen3-vl", "qwen3_vl", qwen3_vl),
            ("qwen3-vl-moe", "qwen3_vl", qwen3_vl_moe),
        )
    ),
    Family(
        "qwen3.5",
        functools.partial(processor, "qwen3_vl"),
        qwen3_5,
        shared=False,
        note="linear-attention layers, whose state runs from token to token",
    ),
]
