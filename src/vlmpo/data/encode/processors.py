"""What a model's own processor says of itself, whatever its family: its tokenizer, its image tokens, its tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from vlmpo import compat
from vlmpo.errors import ModelError

# InternVL's tile, 256 tokens there; 256 tokens too in the Qwen-VL families of 28-pixel tokens, which read images whole.
TILE_PIXELS = 448 * 448


class Sized(Protocol):
    """An image, or its size alone."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...


class Size(NamedTuple):
    """Pixels of an image."""

    height: int
    width: int


_MEDIA = ("image", "video", "audio")
# Names under which processors or tokenizers know the tokens around and between image tokens.
_FRAMES = (
    "start_image_token",
    "end_image_token",
    "vision_start_token",
    "vision_end_token",
    "boi_token",
    "eoi_token",
    "fake_image_token",
    "global_image_token",
    "global_image_tag",
    "image_break_token",
    "image_end_token",
)
_FRAME_IDS = ("row_col_ids",)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a text-only model's is its processor.

    Raises ModelError where it is neither.
    """
    if hasattr(processor, "tokenizer"):
        return processor.tokenizer
    if hasattr(processor, "convert_tokens_to_ids"):
        return processor
    raise ModelError(
        f"{type(processor).__name__} is no processor of text and images and no tokenizer; pass the model's own, as "
        "AutoProcessor.from_pretrained gives it"
    )


def reads_images(processor: Any) -> bool:
    """Whether it turns images into what a vision tower reads; a tokenizer alone does not."""
    return getattr(processor, "image_processor", None) is not None


def image_token_id(processor: Any) -> int | None:
    """The token in whose place the features of an image stand, one token a feature; None for text-only models.

    Gemma 3's processor calls the token before an image by that name; its tokenizer knows the image's own.
    """
    if not reads_images(processor):
        return None
    tokenizer = tokenizer_of(processor)
    ids = (getattr(tokenizer, "image_token_id", None), getattr(processor, "image_token_id", None))
    found = next((id_ for id_ in ids if id_ is not None), None)
    if found is None:
        found = _known(tokenizer, getattr(processor, "image_token", None))
    return found


def image_token(processor: Any) -> str | None:
    """What a prompt's text holds where an image stands; the processor expands it. None where it has no such token."""
    token = getattr(processor, "image_token", None)
    return None if token is None else str(token)


def media_ids(processor: Any) -> frozenset[int]:
    """Ids of the tokens that stand for images, video and sound, and of those that frame them."""
    tokenizer = tokenizer_of(processor)
    ids: set[int | None] = {image_token_id(processor)}
    for medium in _MEDIA:
        ids.add(_known(tokenizer, getattr(processor, f"{medium}_token", None)))
        ids.add(getattr(processor, f"{medium}_token_id", None))
        ids.update(getattr(processor, f"{medium}_token_ids", None) or ())
    for name in _FRAMES if reads_images(processor) else ():
        ids.update(_known(tokenizer, getattr(source, name, None)) for source in (processor, tokenizer))
    for name in _FRAME_IDS:
        ids.update(getattr(processor, name, None) or ())
    # A token the tokenizer does not know comes as its unknown token, which is no image.
    return frozenset(id_ for id_ in ids if id_ is not None and id_ != tokenizer.unk_token_id)


def _known(tokenizer: Any, token: Any) -> int | None:
    found = None if token is None else tokenizer.convert_tokens_to_ids(str(token))
    return None if found == tokenizer.unk_token_id else found


# ---- tiles ----


def tile_kind(processor: Any) -> Literal["grid", "split", "pixels"] | None:
    """How a family's images are bounded: by a grid of tiles (InternVL), by a size that is split into tiles (Idefics3),
    by pixels where an image is read whole at its own shape (Qwen-VL); None where its processor leaves no choice."""
    if not reads_images(processor):
        return None
    image_processor = processor.image_processor
    if hasattr(image_processor, "crop_to_patches") and hasattr(image_processor, "max_patches"):
        return "grid"
    if getattr(image_processor, "do_image_splitting", False) and hasattr(image_processor, "max_image_size"):
        return "split"
    size = getattr(image_processor, "size", None) or {}
    if "image_grid_thw" in image_processor.model_input_names and size.get("shortest_edge") and size.get("longest_edge"):
        return "pixels"
    return None


def tile_settings(processor: Any, tiles: int, images: Sequence[Sized]) -> dict[str, Any]:
    """The image processor's keywords by which each of ``images`` takes its share of ``tiles``, at least one.

    Thumbnails are not counted. Empty where there is nothing to bound, or where the model does not tile.
    """
    if not images:
        return {}
    share = max(1, tiles // len(images))
    kind, size = tile_kind(processor), processor.image_processor.size
    if kind == "grid":
        return {"max_patches": share}
    if kind == "split":
        return _split_settings(processor.image_processor, share, images)
    if kind == "pixels" and share * TILE_PIXELS < size["longest_edge"]:
        return {"size": {"shortest_edge": size["shortest_edge"], "longest_edge": share * TILE_PIXELS}}
    return {}


def count_image_tokens(processor: Any, tiles: int, images: Sequence[Sized]) -> int | None:
    """Tokens that ``images`` of one prompt become, frames between them perhaps included; None where its processor
    cannot tell it from their sizes."""
    count = compat.image_token_counter(processor)
    if not images or count is None:
        return None if images else 0
    sizes = [[image.height, image.width] for image in images]
    try:
        found = count(image_sizes=sizes, images_kwargs=tile_settings(processor, tiles, images))["num_image_tokens"]
        return sum(int(tokens) for tokens in found)
    except (AttributeError, KeyError, TypeError, ValueError):  # a method that is not public: it may change
        return None


def tile_notice(processor: Any, tiles: int) -> str | None:
    """What ``max_tiles`` comes to where it is not tiles; None where it is."""
    kind = tile_kind(processor)
    if not reads_images(processor) or kind in ("grid", "split"):
        return None
    name = type(processor.image_processor).__name__
    if kind is None:
        return f"max_tiles has no effect on this model: {name} sizes its images by settings of its own"
    own, bound = processor.image_processor.size["longest_edge"], tiles * TILE_PIXELS
    if bound >= own:
        return None
    return (
        f"this model reads images whole: max_tiles {tiles} bounds a prompt's images to {tiles} x 448 x 448 = {bound} "
        f"pixels, where {name} alone would take {own} each"
    )


def _split_settings(image_processor: Any, share: int, images: Sequence[Sized]) -> dict[str, Any]:
    """The largest ``size``, in whole tiles, at which no image takes more than ``share`` of them."""
    tile, longest = image_processor.max_image_size["longest_edge"], image_processor.size["longest_edge"]
    if _most_tiles(image_processor, longest, images) <= share:
        return {}
    side = min(share, longest // tile)
    while side > 1 and _most_tiles(image_processor, side * tile, images) > share:
        side -= 1
    return {"size": {"longest_edge": max(side, 1) * tile}}


def _most_tiles(image_processor: Any, longest: int, images: Sequence[Sized]) -> int:
    settings = {"size": {"longest_edge": longest}}
    counts = (image_processor.get_number_of_image_patches(image.height, image.width, settings) for image in images)
    return max(max(1, rows * columns) for _, rows, columns in counts)
