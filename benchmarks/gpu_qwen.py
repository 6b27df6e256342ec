"""The shapes of Qwen2.5-VL-3B and Qwen3-VL-2B, beside InternVL3's in gpu_model.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_model import Flops, make_tokenizer, pairs_seen

MEDIA = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class QwenSize:
    """A Qwen-VL and prompts of one image of ``image`` pixels and a few words; four patches are a token.

    Attributes:
        full, window: layers of the vision tower in which a patch sees the whole image, and the patches of a window in
            the others.
        deepstack: layers whose features are merged once more, for the text tower's first layers (Qwen3-VL).
        mrope: parts of a head's rotary positions that are time, height and width.
    """

    name: str
    version: str
    text_hidden: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    head_width: int
    text_mlp: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    patch_size: int
    image: tuple[int, int]
    full: tuple[int, ...] = ()
    window: int = 0
    deepstack: tuple[int, ...] = ()
    mrope: tuple[int, int, int] = (16, 24, 24)
    vocabulary: int = 151_936
    prompt_words: int = 20
    response_words: tuple[int, int] = (150, 300)

    @property
    def patches(self) -> int:
        """Return the patches of an image."""
        return self.image[0] * self.image[1] // self.patch_size**2

    def processor(self) -> Any:
        """Return the processor, which leaves an image its size."""
        import transformers

        tokenizer = make_tokenizer()
        tokenizer.add_tokens(MEDIA, special_tokens=True)
        kind = {"2.5": "Qwen2_5_VL", "3": "Qwen3VL"}[self.version]
        pixels = self.image[0] * self.image[1]
        images = transformers.Qwen2VLImageProcessor(patch_size=self.patch_size, min_pixels=pixels, max_pixels=pixels)
        videos = transformers.Qwen3VLVideoProcessor if self.version == "3" else transformers.Qwen2VLVideoProcessor
        built: Any = getattr(transformers, f"{kind}Processor")
        return built(image_processor=images, tokenizer=tokenizer, video_processor=videos(), chat_template=TEMPLATE)

    def config(self, tokenizer: Any) -> Any:
        """Return the model's config; head and embeddings are tied."""
        import transformers

        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = dict(zip(names, tokenizer.convert_tokens_to_ids(MEDIA), strict=True))
        text = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.text_hidden,
            "intermediate_size": self.text_mlp,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.text_heads,
            "num_key_value_heads": self.text_kv_heads,
            "max_position_embeddings": 32_768,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "mrope_section": list(self.mrope), "rope_theta": 1e6},
        }
        vision: dict[str, Any] = {
            "depth": self.vision_layers,
            "hidden_size": self.vision_hidden,
            "intermediate_size": self.vision_mlp,
            "num_heads": self.vision_heads,
            "out_hidden_size": self.text_hidden,
            "patch_size": self.patch_size,
        }
        if self.version == "3":
            text |= {"head_dim": self.head_width}
            vision |= {"deepstack_visual_indexes": list(self.deepstack)}
        else:
            edge = int(self.window**0.5) * self.patch_size
            vision |= {"fullatt_block_indexes": list(self.full), "window_size": edge}
        kind: Any = getattr(transformers, {"2.5": "Qwen2_5_VLConfig", "3": "Qwen3VLConfig"}[self.version])
        return kind(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)

    def flops(self, prompt: int, responses: Sequence[int]) -> Flops:
        """Return the operations of a forward, see gpu_model.forward_flops."""
        vision, text, patches = self.vision_hidden, self.text_hidden, self.patches
        gates = 3 if self.version == "2.5" else 2
        merger = (4 * vision) ** 2 + 4 * vision * text  # of four patches
        products = 2 * patches * 2 * 3 * self.patch_size**2 * vision  # an image is two frames
        products += 2 * patches * self.vision_layers * (4 * vision**2 + gates * vision * self.vision_mlp)
        products += 2 * patches // 4 * merger * (1 + len(self.deepstack))
        heads, keys = self.text_heads * self.head_width, self.text_kv_heads * self.head_width
        layer = 2 * text * heads + 2 * text * keys + 3 * text * self.text_mlp
        products += 2 * (prompt + sum(responses)) * self.text_layers * layer
        products += 2 * sum(responses) * self.vocabulary * text
        whole = len(self.full) if self.window else self.vision_layers
        seen = whole * patches**2 + (self.vision_layers - whole) * patches * self.window
        attention = 4 * seen * vision + 4 * self.text_layers * pairs_seen(prompt, responses) * heads
        return Flops(products, attention)


# Prompts of 1,792 image tokens, as those of InternVL3's seven tiles.
QWEN2_5_VL_3B = QwenSize(
    "Qwen2.5-VL-3B", "2.5", 2048, 36, 16, 2, 128, 11_008, 1280, 32, 16, 3420, 14, (448, 3136), (7, 15, 23, 31), 64
)
QWEN3_VL_2B = QwenSize(
    *("Qwen3-VL-2B", "3", 2048, 28, 16, 8, 128, 6144, 1024, 24, 16, 4096, 16, (512, 3584)),
    deepstack=(5, 11, 17),
    mrope=(24, 20, 20),
)
_SMALL = {"vocabulary": 1000, "prompt_words": 5, "response_words": (8, 15)}
MINIATURE_2_5 = QwenSize(
    *("miniature Qwen2.5-VL", "2.5", 32, 2, 4, 2, 8, 64, 32, 2, 2, 64, 14, (56, 112), (1,), 4),
    mrope=(2, 1, 1),
    **_SMALL,  # type: ignore[arg-type]
)
MINIATURE_3 = QwenSize(
    *("miniature Qwen3-VL", "3", 32, 2, 4, 2, 8, 64, 32, 2, 2, 64, 16, (64, 128)),
    deepstack=(0,),
    mrope=(2, 1, 1),
    **_SMALL,  # type: ignore[arg-type]
)
