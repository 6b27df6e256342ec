"""Causal language models without images: preference training on text is a special case and works the same."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.zoo import Family
from tests.zoo.words import finished, tokenizer, tower

# Text-only templates take a message's content as a string.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WINDOW = 24  # shorter than any prompt of the tests: the window cuts every tree


@functools.cache
def tokens() -> Any:
    built = tokenizer(["<|im_start|>"], bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    built.chat_template = TEMPLATE
    return built


def build(seed: int, kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = tower(tokens(), tie_word_embeddings=False, **changes)
    torch.manual_seed(seed)
    return finished(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)), tokens())


def family(kind: str, shared: bool = True, note: str = "text only", **changes: Any) -> Family:
    name = f"{kind.removesuffix('_text').replace('_', '-')}-text"
    return Family(name, tokens, functools.partial(build, kind=kind, **changes), shared, note, images=0)


_GEMMA = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
    "final_logit_softcapping": 2.0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,  # shorter than any prompt of the tests: the scaling is at work
    "llama_4_scaling_beta": 0.5,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED_EXPERT = {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32}

FAMILIES = [
    family("qwen2"),
    family("qwen3"),
    family("llama"),
    family("mistral", note="text only; sliding window", sliding_window=WINDOW),
    family("ministral3", note="text only; scores scaled by position", rope_parameters=_YARN),
    family("gemma3_text", note="text only; sliding windows", **_GEMMA),
    family("qwen3_moe", note="text only; experts", num_experts=4, **_EXPERTS),
    family("qwen2_moe", note="text only; experts, one of them shared", **_SHARED_EXPERT),
    family("mixtral", note="text only; experts", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    family("granite", note="text only; logits divided", logits_scaling=3.0),
    family("cohere", note="text only; logits multiplied", logit_scale=0.3),
    family(
        "gemma2",
        shared=False,
        note="text only; attention scores are capped",
        attn_logit_softcapping=5.0,
        **_GEMMA,
    ),
]
