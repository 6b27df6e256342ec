"""Gemma 3: an image attends to itself in both directions, and most layers see a window only."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tests.zoo import Family
from tests.zoo.words import finished, tokenizer, tower

IMAGE = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
WINDOW = 24  # shorter than any prompt of the tests: the window cuts every tree


@functools.cache
def tokens() -> Any:
    special = ["<start_of_turn>", *IMAGE.values()]
    plain = tokenizer(special, bos="<bos>", eos="<end_of_turn>", pad="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token="<bos>",
        eos_token="<end_of_turn>",
        pad_token="<pad>",
        extra_special_tokens=IMAGE,
        padding_side="left",
        chat_template=TEMPLATE,
    )


@functools.cache
def processor() -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    return Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokens(),
        image_seq_length=4,
        chat_template=TEMPLATE,
    )


def text_sizes() -> dict[str, Any]:
    """A tower of one layer with a window and one without."""
    return tower(
        tokens(),
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )


def gemma3(seed: int) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    image, start, end = tokens().convert_tokens_to_ids(list(IMAGE.values()))
    torch.manual_seed(seed)
    config = Gemma3Config(
        text_config=text_sizes(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_id=image,
        boi_token_id=start,
        eoi_token_id=end,
        initializer_range=0.2,
    )
    built = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # born as zeros, which would hide the image
        built.model.multi_modal_projector.mm_input_projection_weight.normal_(0.0, 0.2)
    return finished(built, tokens())


FAMILIES = [
    Family("gemma3", processor, gemma3, shared=True, note="images attend to themselves both ways; sliding windows")
]
