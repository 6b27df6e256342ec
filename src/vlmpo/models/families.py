"""List what is particular to each model family, one row a family, and look it up.

A family has a mark only if a test compares it with the plain model's numbers. A family without a row, or without a
mark, is read in separate rows, one response a row: exact for any causal model, only slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """Describes one ``model_type`` of transformers: a whole model, or the text tower inside one.

    Attributes:
        model_type: the config's ``model_type``.
        shared: prompts may be shared between responses: the vision tower sees nothing of the row.
        causal_text: text tower whose layers attend causally, over everything or a window, and change the attention
            scores in no other way.
        three_dimensional: counts positions by time, height and width, through ``get_rope_index``.
        image_blocks: image tokens attend to their whole image, in both directions.
        takes_features: reads image features (keyword ``mm_encoder_outputs``) exactly as it reads pixels.
        routed: text tower with a softmax over all experts, then the top k of them.
        replaces_image_tokens: looks up another embedding for image tokens, which may be beyond its vocabulary.
        batches_images: ``generate`` encodes a prompt's images once for all its samples, and batches prompts with
            different numbers of tiles.
        logits: how the family changes the output of its vocabulary head. The names in configs are no guide:
            ``logits_scaling`` divides in one family and multiplies in the next, and a vision-language model may ignore
            the soft cap of its text tower.
    """

    model_type: str
    shared: bool = False
    causal_text: bool = False
    three_dimensional: bool = False
    image_blocks: bool = False
    takes_features: bool = False
    routed: bool = False
    replaces_image_tokens: bool = False
    batches_images: bool = False
    logits: Literal["softcap", "divide", "multiply"] | None = None


_ROWS = (
    # Text models and text towers.
    Family("cohere", causal_text=True, logits="multiply"),
    Family("cohere2", logits="multiply"),
    Family("gemma2", logits="softcap"),
    Family("gemma3_text", causal_text=True, logits="softcap"),
    Family("granite", causal_text=True, logits="divide"),
    Family("granitemoe", logits="divide"),
    Family("granitemoeshared", logits="divide"),
    Family("llama", causal_text=True),
    Family("ministral3", causal_text=True),
    Family("mistral", causal_text=True),
    Family("mixtral", causal_text=True, routed=True),
    Family("qwen2", causal_text=True),
    Family("qwen2_5_vl_text", causal_text=True),
    Family("qwen2_moe", causal_text=True, routed=True),
    Family("qwen2_vl_text", causal_text=True),
    Family("qwen3", causal_text=True),
    Family("qwen3_moe", causal_text=True, routed=True),
    Family("qwen3_vl_moe_text", causal_text=True, routed=True),
    Family("qwen3_vl_text", causal_text=True),
    # Vision-language models.
    Family("gemma3", shared=True, takes_features=True, image_blocks=True, replaces_image_tokens=True),
    Family("idefics3", shared=True, takes_features=True),
    Family("internvl", shared=True, takes_features=True, batches_images=True),
    Family("llava", shared=True, takes_features=True),
    Family("llava_next", shared=True, takes_features=True),
    Family("llava_onevision", shared=True, takes_features=True),
    Family("mistral3", shared=True, takes_features=True),
    Family("qwen2_5_vl", shared=True, takes_features=True, three_dimensional=True),
    Family("qwen2_vl", shared=True, takes_features=True, three_dimensional=True),
    Family("qwen3_5", takes_features=True),
    Family("qwen3_vl", shared=True, takes_features=True, three_dimensional=True),
    Family("qwen3_vl_moe", shared=True, takes_features=True, three_dimensional=True),
    Family("smolvlm", shared=True, takes_features=True),
)
FAMILIES = {row.model_type: row for row in _ROWS}

_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class Fused:
    """Says which fused kernel computes what the modules of one class compute, and how; see vlmpo.models.kernels.

    Attributes:
        kind: ``rms_norm``; ``glu``, a gated MLP ``down(act(gate(x)) * up(x))``; ``mlp``, a plain one
            ``second(act(first(x)))``; ``layer_norm``; ``rotary``, an attention that rotates queries and keys by halves.
        eps: the attribute of a norm that holds its epsilon.
        offset: what a norm adds to its weight.
        casting: ``llama``: normalised in float32, cast back, then multiplied by the weight; ``gemma``: all of it in
            float32, cast at the end.
        parts: the attributes of a plain MLP: first matrix, activation, second matrix.
    """

    kind: Literal["rms_norm", "glu", "mlp", "layer_norm", "rotary"]
    eps: str = "variance_epsilon"
    offset: float = 0.0
    casting: Literal["llama", "gemma"] = "llama"
    parts: tuple[str, str, str] = ("fc1", "activation_fn", "fc2")


# By package of transformers and class, of version 5.23. Not here: Cohere's norms, which have a mean and no bias;
# experts; MLPs with one projection for gate and up.
_FUSED = {
    **dict.fromkeys(
        (
            *("granite.GraniteRMSNorm", "granitemoe.GraniteMoeRMSNorm", "granitemoeshared.GraniteMoeSharedRMSNorm"),
            *("idefics3.Idefics3RMSNorm", "internvl.InternVLVisionRMSNorm", "llama.LlamaRMSNorm"),
            *("ministral3.Ministral3RMSNorm", "mistral.MistralRMSNorm", "mistral3.Mistral3RMSNorm"),
            *("mixtral.MixtralRMSNorm", "pixtral.PixtralRMSNorm", "qwen2.Qwen2RMSNorm", "qwen2_5_vl.Qwen2_5_VLRMSNorm"),
            *("qwen2_moe.Qwen2MoeRMSNorm", "qwen2_vl.Qwen2VLRMSNorm", "qwen3.Qwen3RMSNorm"),
            *("qwen3_moe.Qwen3MoeRMSNorm", "qwen3_vl.Qwen3VLTextRMSNorm", "qwen3_vl_moe.Qwen3VLMoeTextRMSNorm"),
        ),
        Fused("rms_norm"),
    ),
    **dict.fromkeys(
        ("gemma2.Gemma2RMSNorm", "gemma3.Gemma3RMSNorm", "qwen3_5.Qwen3_5RMSNorm"),
        Fused("rms_norm", eps="eps", offset=1.0, casting="gemma"),
    ),
    **dict.fromkeys(
        (
            *("cohere.CohereMLP", "cohere2.Cohere2MLP", "gemma2.Gemma2MLP", "gemma3.Gemma3MLP", "granite.GraniteMLP"),
            *("llama.LlamaMLP", "ministral3.Ministral3MLP", "mistral.MistralMLP", "pixtral.PixtralMLP"),
            *("qwen2.Qwen2MLP", "qwen2_5_vl.Qwen2MLP", "qwen2_5_vl.Qwen2_5_VLMLP", "qwen2_moe.Qwen2MoeMLP"),
            *("qwen2_vl.Qwen2MLP", "qwen3.Qwen3MLP", "qwen3_5.Qwen3_5MLP", "qwen3_moe.Qwen3MoeMLP"),
            *("qwen3_vl.Qwen3VLTextMLP", "qwen3_vl_moe.Qwen3VLMoeTextMLP"),
        ),
        Fused("glu"),
    ),
    **dict.fromkeys(
        (
            *("clip.CLIPMLP", "idefics3.Idefics3VisionMLP", "internvl.InternVLVisionMLP", "siglip.SiglipMLP"),
            "smolvlm.SmolVLMVisionMLP",
        ),
        Fused("mlp"),
    ),
    "qwen2_vl.VisionMlp": Fused("mlp", parts=("fc1", "act", "fc2")),
    **dict.fromkeys(
        ("qwen3_vl.Qwen3VLVisionMLP", "qwen3_vl_moe.Qwen3VLMoeVisionMLP", "qwen3_5.Qwen3_5VisionMLP"),
        Fused("mlp", parts=("linear_fc1", "act_fn", "linear_fc2")),
    ),
    "torch.LayerNorm": Fused("layer_norm", eps="eps"),
    **dict.fromkeys(
        (
            *("llama.LlamaAttention", "mistral.MistralAttention", "qwen2.Qwen2Attention", "qwen3.Qwen3Attention"),
            *("qwen2_5_vl.Qwen2_5_VLAttention", "qwen2_vl.Qwen2VLAttention", "qwen3_vl.Qwen3VLTextAttention"),
        ),
        Fused("rotary"),
    ),
}


def fused_of(module: Any) -> Fused | None:
    """Return how a fused kernel may compute ``module``, by its very class; None if it has no row."""
    package = type(module).__module__.removeprefix("transformers.models.").partition(".")[0]
    return _FUSED.get(f"{package}.{type(module).__name__}")


# Names of submodules, over all families that transformers loads as image-text-to-text models.
_VISION_MODULES = frozenset(
    {
        *("vision_tower", "vision_model", "vision_encoder", "vision_backbone", "vision", "visual", "vit"),
        *("image_tower", "image_encoder", "video_tower", "high_res_vision_model", "vision_embed_tokens"),
    }
)
_PROJECTOR_MODULES = frozenset(
    {
        *("multi_modal_projector", "mm_projector", "projector", "connector", "aligner", "mlp1", "modality_projection"),
        *("merger", "merger_list", "deepstack_merger_list", "resampler", "resampler_model", "perceiver_resampler"),
        *("qformer", "query_tokens", "language_projection", "visual_projection", "vision_projection", "vision_adapter"),
        *("image_to_text_projection", "embed_vision", "visual_embeddings_table", "image_newline", "view_separator"),
        *("high_res_vision_neck", "high_res_vision_proj", "high_res_vision_alpha"),
    }
)


def family_of(config: Any) -> Family:
    """Return the row of the family that ``config`` belongs to; a row without any mark if the family is unknown."""
    return FAMILIES.get(config.model_type, Family(config.model_type))


@dataclass(frozen=True)
class Support:
    """Holds whether the rows of a model may share prompts, and why or why not."""

    shared: bool
    reason: str


def support_for(config: Any) -> Support:
    """Decide from a model's config whether its rows may share prompts."""
    family, text_config = family_of(config), config.get_text_config()
    text = family_of(text_config)
    unknown_layers = set(getattr(text_config, "layer_types", None) or []) - _KNOWN_LAYERS
    if unknown_layers:
        return Support(
            False,
            f"its text tower has layers of kind {', '.join(sorted(unknown_layers))}, whose state runs from token to "
            "token",
        )
    if not family.shared and not family.causal_text:
        return Support(False, f"family {family.model_type!r} is not on the list of those tested with shared rows")
    if not text.causal_text:
        return Support(False, f"text tower {text.model_type!r} is not on the list of those tested with shared rows")
    if getattr(text_config, "use_bidirectional_attention", None):
        return Support(False, "its text tower attends in both directions")
    return Support(True, f"{family.model_type} with a {text.model_type} text tower")


def logit_scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """Return how a model changes its projected logits ``x``: the scale of ``x``, and the soft cap after it or None.

    Args:
        config: the whole model's config, not its text tower's.
    """
    match family_of(config).logits:
        case "softcap":
            return 1.0, config.final_logit_softcapping
        case "divide":
            return 1.0 / config.logits_scaling, None
        case "multiply":
            return config.logit_scale, None
    return 1.0, None


def part_of(parameter_name: str) -> Literal["vision", "projector", "text"]:
    """Return the part of the model that a parameter belongs to, by its dotted name.

    The projector is looked for first, because a merger may sit inside the vision tower. LoRA's parameters belong to
    the part they sit in.
    """
    modules = set(parameter_name.split("."))
    if modules & _PROJECTOR_MODULES:
        return "projector"
    return "vision" if modules & _VISION_MODULES else "text"
