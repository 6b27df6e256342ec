"""Which model families can share a trunk, and what each needs.

A family is on the list only when shared rows were tested against separate forwards. Every other one is read by
separate rows, one response a row: exact for any causal model, only slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Text towers with plain causal attention in every layer and one position a token.
PLAIN_CAUSAL_TEXT = frozenset({"qwen2", "qwen3", "llama"})
# Families whose vision inputs are stacked along dimension 0 and whose positions are those of the text tower.
SHARED_FAMILIES = frozenset({"internvl"})


@dataclass(frozen=True)
class Support:
    """Whether a model's rows may share trunks, and why not where they may not."""

    shared: bool
    reason: str


def support_for(config: Any) -> Support:
    """Judge a model by its config: ``shared`` rows, or separate ones with the reason."""
    family = config.model_type
    text = config.get_text_config()
    if family not in SHARED_FAMILIES and family not in PLAIN_CAUSAL_TEXT:
        return Support(False, f"family {family!r} is not on the list of those tested with shared rows")
    if text.model_type not in PLAIN_CAUSAL_TEXT:
        return Support(False, f"text tower {text.model_type!r} is not on the list of those tested with shared rows")
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return Support(False, f"its text tower has layers of kind {', '.join(sorted(kinds - {'full_attention'}))}")
    return Support(True, f"{family} with a {text.model_type} text tower")
