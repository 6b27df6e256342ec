"""Reads a processor of any family: its tokenizer, its image tokens, its tiles."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from vlmpo.compat import image_token_counter
from vlmpo.errors import ModelError

# InternVL's tile, of 256 tokens. As many pixels are 256 tokens in those Qwen-VL families whose token is 28 pixels wide.
TILE_PIXELS = 448 * 448
# Tiles of a prompt for models that read images whole: their own bound may be 84 tiles, 16,384 tokens an image.
WHOLE_TILES = 12


class Size(NamedTuple):
    """Holds the height and width of an image in pixels."""

    height: int
    width: int


_MEDIA = ("image", "video", "audio")
# Attributes of processors and tokenizers that hold a token around or between image tokens.
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


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor; a text-only model's processor is its tokenizer.

    Raises:
        ModelError: ``processor`` is neither.
    """
    if hasattr(processor, "tokenizer"):
        return processor.tokenizer
    if hasattr(processor, "convert_tokens_to_ids"):
        return processor
    raise ModelError(
        f"{type(processor).__name__} is no processor of text and images and no tokenizer; pass what "
        "AutoProcessor.from_pretrained loads for the model"
    )


def reads_images(processor: Any) -> bool:
    """Return whether ``processor`` reads images; a tokenizer alone does not."""
    return getattr(processor, "image_processor", None) is not None


def image_token_id(processor: Any) -> int | None:
    """Return the id of the token that an image's features replace, one token a feature; None for text-only models.

    The tokenizer's attribute goes first: Gemma 3's processor has the token before an image under the same name.
    """
    if not reads_images(processor):
        return None
    tokenizer = tokenizer_of(processor)
    for source in (tokenizer, processor):
        token_id = getattr(source, "image_token_id", None)
        if token_id is not None:
            return token_id
    return _known_id(tokenizer, image_token(processor))


def image_token(processor: Any) -> str | None:
    """Return the token that marks an image in a prompt's text, which the processor expands; None if there is none."""
    token = getattr(processor, "image_token", None)
    return None if token is None else str(token)


def media_ids(processor: Any) -> frozenset[int]:
    """Return the ids of the tokens that stand for images, video and sound, and of those that frame them."""
    tokenizer = tokenizer_of(processor)
    ids: set[int | None] = {image_token_id(processor), *(getattr(processor, "row_col_ids", None) or ())}
    for medium in _MEDIA:
        ids.add(_known_id(tokenizer, getattr(processor, f"{medium}_token", None)))
        ids.add(getattr(processor, f"{medium}_token_id", None))
        ids.update(getattr(processor, f"{medium}_token_ids", None) or ())
    for name in _FRAMES if reads_images(processor) else ():
        ids.update(_known_id(tokenizer, getattr(source, name, None)) for source in (processor, tokenizer))
    # The unknown token is no image: processors hold its id for tokens that the tokenizer does not have.
    return frozenset(token_id for token_id in ids if token_id is not None and token_id != tokenizer.unk_token_id)


def _known_id(tokenizer: Any, token: Any) -> int | None:
    token_id = None if token is None else tokenizer.convert_tokens_to_ids(str(token))
    return None if token_id == tokenizer.unk_token_id else token_id


# ---- tiles ----


def tile_kind(processor: Any) -> Literal["grid", "split", "pixels"] | None:
    """Return how the size of images can be bounded; None if the processor leaves no choice.

    ``grid``: by a grid of tiles (InternVL). ``split``: by a size that is split into tiles (Idefics3). ``pixels``: by
    pixels, as images are read whole, at their own shape (Qwen-VL).
    """
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


def own_tiles(processor: Any) -> int:
    """Return the tiles that a prompt's images may take together if nobody sets a bound.

    They are those that the processor allows ONE image, so that a prompt of one image is read as the processor alone
    reads it. Models that read images whole take WHOLE_TILES at most. So do models whose processor leaves no choice: the
    number then means nothing.
    """
    kind = tile_kind(processor)
    if kind is None:
        return WHOLE_TILES
    images = processor.image_processor
    if kind == "grid":
        return max(1, int(images.max_patches))
    if kind == "split":
        return math.ceil(images.size["longest_edge"] / images.max_image_size["longest_edge"]) ** 2
    return min(WHOLE_TILES, math.ceil(images.size["longest_edge"] / TILE_PIXELS))


def with_tiles(processor: Any, tiles: int | None) -> Any:
    """Return ``processor`` with ``tiles`` as its own bound of an image, for others to use; itself if nothing changes.

    A bound only lowers the size of images that are split, or read whole. One that is split may be wide or high: its
    longer edge is set so that a square one, which takes most tiles, keeps within ``tiles``.
    """
    kind = tile_kind(processor)
    if tiles is None or kind is None:
        return processor
    images = processor.image_processor
    if kind == "grid":
        changes: dict[str, Any] = {"max_patches": tiles, "min_patches": min(getattr(images, "min_patches", 1), tiles)}
        unchanged = tiles == images.max_patches
    else:
        longest = math.isqrt(tiles) * images.max_image_size["longest_edge"] if kind == "split" else tiles * TILE_PIXELS
        changes = {"size": _bounded(images.size, longest)}
        unchanged = longest >= images.size["longest_edge"]
    if unchanged:
        return processor
    changed = copy.copy(processor)
    changed.image_processor = copy.copy(images)
    for name, value in changes.items():
        setattr(changed.image_processor, name, value)
    return changed


def tile_settings(processor: Any, tiles: int, sizes: Sequence[Size]) -> dict[str, Any]:
    """Return the image processor's settings under which each image may take its share of ``tiles``, at least one.

    Thumbnails are not counted. Empty if there is nothing to bound, or if the processor leaves no choice.
    """
    if not sizes:
        return {}
    share = max(1, tiles // len(sizes))
    kind, size = tile_kind(processor), processor.image_processor.size
    if kind == "grid":
        fewest = getattr(processor.image_processor, "min_patches", 1)
        return {"max_patches": share} | ({"min_patches": share} if share < fewest else {})
    if kind == "split":
        return _split_settings(processor.image_processor, share, sizes)
    if kind == "pixels" and share * TILE_PIXELS < size["longest_edge"]:
        return {"size": _bounded(size, share * TILE_PIXELS)}
    return {}


def count_image_tokens(processor: Any, tiles: int, sizes: Sequence[Size]) -> int | None:
    """Return how many tokens one prompt's images become, frames perhaps included; None if that is not known."""
    if not sizes:
        return 0
    count = image_token_counter(processor)
    if count is None:
        return None
    try:
        settings = tile_settings(processor, tiles, sizes)
        counts = count(image_sizes=[list(size) for size in sizes], images_kwargs=settings)["num_image_tokens"]
        return sum(int(tokens) for tokens in counts)
    except (AttributeError, KeyError, TypeError, ValueError):  # a method that is not public: it may change
        return None


def tile_notice(processor: Any, tiles: int) -> str | None:
    """Explain what ``max_tiles`` means for a model that does not tile; None if it tiles."""
    kind = tile_kind(processor)
    if not reads_images(processor) or kind in ("grid", "split"):
        return None
    name = type(processor.image_processor).__name__
    if kind is None:
        return f"max_tiles has no effect on this model: {name} sizes its images by settings of its own"
    default, bound = processor.image_processor.size["longest_edge"], tiles * TILE_PIXELS
    if bound >= default:
        return None
    return (
        f"this model reads images whole: max_tiles {tiles} bounds a prompt's images to {tiles} x 448 x 448 = {bound} "
        f"pixels, where {name} alone would take {default} each"
    )


def _bounded(size: Any, longest: int) -> dict[str, int]:
    """Return an image processor's ``size`` with another longest edge, or most pixels, and a shortest to match."""
    shortest = size.get("shortest_edge")
    return {"longest_edge": longest} | ({} if shortest is None else {"shortest_edge": min(shortest, longest)})


def _split_settings(image_processor: Any, share: int, sizes: Sequence[Size]) -> dict[str, Any]:
    """Return the largest ``size``, in whole tiles, at which no image takes more than ``share`` of them."""
    tile, longest = image_processor.max_image_size["longest_edge"], image_processor.size["longest_edge"]
    if _most_tiles(image_processor, longest, sizes) <= share:
        return {}
    side = min(share, longest // tile)
    while side > 1 and _most_tiles(image_processor, side * tile, sizes) > share:
        side -= 1
    return {"size": {"longest_edge": max(side, 1) * tile}}


def _most_tiles(image_processor: Any, longest: int, sizes: Sequence[Size]) -> int:
    settings = {"size": {"longest_edge": longest}}
    counts = (image_processor.get_number_of_image_patches(size.height, size.width, settings) for size in sizes)
    return max(max(1, rows * columns) for _, rows, columns in counts)
