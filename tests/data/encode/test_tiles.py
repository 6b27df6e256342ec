"""Without any key a prompt of one image is what the bare processor makes of it; more images share its bound."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.data.encode.test_encode_families import idefics_of, pair, qwen_of
from tests.tiny_models import SIZE, noise_image, tokenizer
from tests.zoo import FAMILIES, Family
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.encode.processors import own_tiles, tile_kind, with_tiles
from vlmpo.models.loading import load_processor
from vlmpo.testing.tiny import TinySize, build_processor

SEEING = [family for family in FAMILIES.values() if family.images]
SIZES = ((112, 40), (40, 100), (56, 56), (28, 200), (300, 220), (90, 61))
TILE = 448 * 448


def bare(processor: Any, image: Image.Image) -> dict[str, torch.Tensor]:
    """What the processor makes of the image and a question, called without any setting."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    text = text.removeprefix(bos) if bos else text  # the tokenizer writes its own
    return {
        name: torch.as_tensor(value) for name, value in processor(text=text, images=image, return_tensors="pt").items()
    }


def encode(encoder: PairEncoder, images: Sequence[Image.Image], max_tiles: int | None = None) -> EncodedPair:
    return encoder.encode(pair("<image>\n" * len(images) + "what is it?", *images, max_tiles=max_tiles))


@pytest.mark.parametrize("family", SEEING, ids=lambda family: family.name)
def test_one_image_without_any_key_is_the_bare_processors(family: Family) -> None:
    own = family.processor()
    for seed, size in enumerate(SIZES):
        image = noise_image(*size, seed)
        plain = bare(own, image)
        for encoder in (PairEncoder(own), PairEncoder(own).for_loader()):
            encoded = encode(encoder, [image])
            assert encoded.prompt_ids.tolist() == plain["input_ids"][0].tolist()
            scale = encoder.pixel_scale
            vision = encoded.vision if scale is None else scale.normalise(encoded.vision)
            assert vision.keys() == plain.keys() - {"input_ids", "attention_mask"} - encoded.token_types.keys()
            assert all(torch.equal(tensor, plain[name]) for name, tensor in vision.items())


@pytest.mark.parametrize("family", SEEING, ids=lambda family: family.name)
@pytest.mark.parametrize("count", [2, 8])
def test_images_share_the_bound_of_one(family: Family, count: int) -> None:
    own = family.processor()
    bound = own_tiles(own)
    frames = [noise_image(112, 80, seed) for seed in range(count)]
    encoded = encode(PairEncoder(own), frames)
    # Each as it is under a bound of its own share, counted for it alone.
    alone = [encode(PairEncoder(own, max_tiles=max(1, bound // count)), [frame]) for frame in frames]
    if family.name != "llava-onevision":  # reads an image otherwise if it is not alone, whatever its bound
        assert encoded.tiles == sum(one.tiles for one in alone)
        assert encoded.image_tokens == sum(one.image_tokens for one in alone)
    if tile_kind(own) in ("grid", "split"):
        assert encoded.tiles <= max(bound, count) + count  # a thumbnail each


def internvl_of(tiles: int, side: int = 28) -> Any:
    return build_processor(tokenizer(), TinySize(image_size=side, max_tiles=tiles))


@pytest.mark.parametrize(
    ("own", "tiles"),
    [
        (internvl_of(12), 12),
        (internvl_of(4), 4),
        (internvl_of(40), 40),
        (idefics_of(4), 16),
        (idefics_of(1), 1),
        (qwen_of(4 * TILE), 4),
        (qwen_of(4 * TILE + 28 * 28), 5),  # one image may take all of it
        (qwen_of(64 * TILE), 12),  # whole images: the printed bound
        (FAMILIES["gemma3"].processor(), 12),  # nothing to bound
        (tokenizer(), 12),
    ],
)
def test_the_bound_of_a_processor(own: Any, tiles: int) -> None:
    assert own_tiles(own) == tiles
    if hasattr(own, "tokenizer"):
        assert PairEncoder(own).max_tiles == tiles


@pytest.mark.parametrize(
    ("own", "given", "of_set", "images", "taken"),
    [
        (4, None, None, 1, 4),
        (4, None, None, 2, 2),
        (4, None, None, 8, 1),
        (4, None, 2, 1, 2),
        (4, None, 6, 1, 6),  # the set's own number, above the processor's
        (4, 6, None, 1, 6),  # the user's key, above the processor's
        (4, 6, 8, 1, 6),  # both: the lower
        (4, 6, 3, 1, 3),
        (12, 12, 24, 1, 12),
        (12, None, 24, 2, 12),
    ],
)
def test_whose_number_rules(own: int, given: int | None, of_set: int | None, images: int, taken: int) -> None:
    """Images of 28 x 672 pixels: 24 tiles of 28 one above the other, or as many as they may take, and a thumbnail."""
    encoder = PairEncoder(internvl_of(own), max_tiles=given)
    encoded = encode(encoder, [noise_image(28, 672, seed) for seed in range(images)], of_set)
    assert encoded.tiles == images * (taken + (taken > 1))


def test_a_set_raises_the_bound_of_whole_images_up_to_the_processors_own() -> None:
    image, own = noise_image(3000, 1800, 0), qwen_of(20 * TILE)
    pixels = {}
    for of_set in (None, 12, 15, 20, 64):
        grid = encode(PairEncoder(own), [image], of_set).vision["image_grid_thw"]
        pixels[of_set] = int(grid.prod()) * 14 * 14
    assert pixels[None] == pixels[12] <= 12 * TILE < pixels[15] <= 15 * TILE < pixels[20] == pixels[64] <= 20 * TILE


def test_fewest_tiles_above_the_share() -> None:
    """A processor that cuts an image into at least four: eight images may take one each, and do."""
    own = internvl_of(6)
    own.image_processor.min_patches = 4
    assert encode(PairEncoder(own), [noise_image(60, 60, seed) for seed in range(8)]).tiles == 8
    assert encode(PairEncoder(own), [noise_image(60, 60, 0)]).tiles == 5


def test_pixels_too_many_at_least_for_the_share() -> None:
    own = qwen_of(4 * TILE)
    own.image_processor.size = {"shortest_edge": 2 * TILE, "longest_edge": 4 * TILE}
    encoded = encode(PairEncoder(own), [noise_image(896, 896, seed) for seed in range(4)])
    assert encoded.vision["image_grid_thw"].tolist() == [[1, 32, 32]] * 4  # a tile each, 448 x 448


# ---- the number used, in keys of caches ----


@pytest.mark.parametrize(
    ("given", "sets", "key"),
    [
        (None, (), 4),
        (None, (None, 4, 2), 4),  # as with an explicit 4
        (4, (None, 24), 4),
        (12, (), 12),
        (None, (None, 24), "4, or a set's own"),  # an explicit 4 would keep that set to 4
    ],
)
def test_key_of_a_cache(given: int | None, sets: tuple[int | None, ...], key: int | str) -> None:
    assert PairEncoder(internvl_of(4), max_tiles=given).tiles_key(sets) == key


# ---- the processor that is saved ----


@pytest.mark.parametrize(
    ("own", "given", "setting", "value"),
    [
        (internvl_of(4), 6, "max_patches", 6),
        (internvl_of(12), 1, "max_patches", 1),
        (idefics_of(4), 9, "longest_edge", 3 * 28),
        (idefics_of(4), 12, "longest_edge", 3 * 28),  # 4 x 4 would be sixteen
        (idefics_of(4), 1, "longest_edge", 28),
        (qwen_of(4 * TILE), 2, "longest_edge", 2 * TILE),
    ],
)
def test_it_takes_the_recipes_number(tmp_path: Path, own: Any, given: int, setting: str, value: int) -> None:
    before = copy.deepcopy(own.image_processor.to_dict())
    with_tiles(own, given).save_pretrained(tmp_path)
    assert own.image_processor.to_dict() == before
    images = load_processor(str(tmp_path)).image_processor
    assert (images.max_patches if setting == "max_patches" else images.size[setting]) == value
    reloaded = load_processor(str(tmp_path))
    shown = noise_image(112, 112, 0)
    assert encode(PairEncoder(reloaded), [shown]).tiles == encode(PairEncoder(own, max_tiles=given), [shown]).tiles


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_it_stays_as_it_came_without_a_number(family: Family) -> None:
    own = family.processor()
    assert with_tiles(own, None) is own
    if tile_kind(own) != "grid":
        assert with_tiles(own, 1000) is own  # a bound raises nothing
    else:
        assert with_tiles(own, SIZE.max_tiles) is own
