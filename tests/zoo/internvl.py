"""InternVL around each of its text towers."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.tiny_models import model, processor
from tests.zoo import Family


def build(seed: int, tower: str) -> Any:
    """The tiny InternVL of the demo with ``tower`` as its text part."""
    from transformers import AutoConfig, InternVLForConditionalGeneration

    config = model().config
    text = config.text_config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "initializer_range", "eos_token_id", "pad_token_id")
    config.text_config = AutoConfig.for_model(tower, **{k: text[k] for k in kept}, head_dim=16, bos_token_id=None)
    torch.manual_seed(seed)
    built = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        built.model.vision_tower.embeddings.position_embeddings.normal_(0.0, 0.2)
    built.generation_config.eos_token_id = text["eos_token_id"]
    built.generation_config.pad_token_id = text["pad_token_id"]
    return built.eval()


FAMILIES = [
    Family(f"internvl-{tower}", processor, functools.partial(build, tower=tower), shared=True)
    for tower in ("qwen2", "qwen3", "llama")
]
