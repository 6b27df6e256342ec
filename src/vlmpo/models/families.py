"""Which model families can share a prompt, and what each needs.

A family is on the list only when shared rows were tested against separate forwards. Every other one is read by
separate rows, one response a row: exact for any causal model, only slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Text towers whose layers attend causally, over everything or a window, with nothing else done to the scores.
CAUSAL_TEXT = frozenset(
    {
        "cohere",
        "gemma3_text",
        "granite",
        "llama",
        "ministral3",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_moe",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_moe",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
    }
)
# Families whose vision tower sees nothing of the row, and whose text tower is one of those above.
SHARED_FAMILIES = frozenset(
    {
        "gemma3",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
    }
)
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class Support:
    """Whether a model's rows may share prompts, and why not where they may not."""

    shared: bool
    reason: str


def support_for(config: Any) -> Support:
    """Judge a model by its config: ``shared`` rows, or separate ones with the reason."""
    family = config.model_type
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or []) - _KNOWN_LAYERS
    if kinds:
        return Support(
            False, f"its text tower has layers of kind {', '.join(sorted(kinds))}, whose state runs from token to token"
        )
    if family not in SHARED_FAMILIES and family not in CAUSAL_TEXT:
        return Support(False, f"family {family!r} is not on the list of those tested with shared rows")
    if text.model_type not in CAUSAL_TEXT:
        return Support(False, f"text tower {text.model_type!r} is not on the list of those tested with shared rows")
    if getattr(text, "use_bidirectional_attention", None):
        return Support(False, "its text tower attends in both directions")
    return Support(True, f"{family} with a {text.model_type} text tower")
