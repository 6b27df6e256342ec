"""Vision tensors of several prompts in one row: by hand, and as every family's own vision tower reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import noise_image
from tests.zoo import FAMILIES, Family
from vlmpo import Message, PreferencePair
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.tree.vision import merge_vision

# ---- by hand ----


def filled(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value)


def test_what_is_listed_along_the_first_dimension_is_concatenated() -> None:
    parts = [
        {"pixel_values": filled(1.0, 2, 3, 4, 4)},
        {},  # a prompt without images
        {"pixel_values": filled(2.0, 1, 3, 4, 4), "image_grid_thw": torch.tensor([[1, 2, 2]])},
    ]
    merged = merge_vision(parts)
    assert merged["pixel_values"].shape == (3, 3, 4, 4)
    assert merged["pixel_values"][:, 0, 0, 0].tolist() == [1.0, 1.0, 2.0]
    assert merged["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert merge_vision([]) == merge_vision([{}, {}]) == {}


def test_images_of_more_patches_make_room_for_those_of_fewer() -> None:
    """LLaVA-NeXT's way: 2 patches beside 3 are followed by one of zeros."""
    one = {"pixel_values": filled(1.0, 1, 2, 3, 4, 4), "image_sizes": torch.tensor([[4, 8]])}
    two = {"pixel_values": filled(2.0, 2, 3, 3, 4, 4), "image_sizes": torch.tensor([[8, 8], [8, 4]])}
    merged = merge_vision([one, two])
    assert merged["pixel_values"].shape == (3, 3, 3, 4, 4)
    assert merged["pixel_values"][:, :, 0, 0, 0].tolist() == [[1, 1, 0], [2, 2, 2], [2, 2, 2]]
    assert merged["image_sizes"].tolist() == [[4, 8], [8, 8], [8, 4]]


def test_images_of_several_shapes_are_filled_up_to_the_right_and_below() -> None:
    """Pixtral's way."""
    wide = {"pixel_values": filled(1.0, 1, 3, 2, 4), "image_sizes": torch.tensor([[2, 4]])}
    tall = {"pixel_values": filled(2.0, 1, 3, 3, 2), "image_sizes": torch.tensor([[3, 2]])}
    merged = merge_vision([wide, tall])["pixel_values"]
    assert merged.shape == (2, 3, 3, 4)
    assert merged[0, 0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert merged[1, 0].tolist() == [[2, 2, 0, 0], [2, 2, 0, 0], [2, 2, 0, 0]]


def test_pictures_listed_by_prompt_come_into_one_prompt() -> None:
    """Idefics3's way: the row is one prompt."""
    parts = [
        {"pixel_values": filled(v, 1, n, 3, 4, 4), "pixel_attention_mask": torch.ones(1, n, 4, 4, dtype=torch.long)}
        for v, n in ((1.0, 2), (2.0, 3))
    ]
    merged = merge_vision(parts)
    assert merged["pixel_values"].shape == (1, 5, 3, 4, 4)
    assert merged["pixel_values"][0, :, 0, 0, 0].tolist() == [1, 1, 2, 2, 2]
    assert merged["pixel_attention_mask"].shape == (1, 5, 4, 4)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # Nobody says how large either image is: zeros would be read as part of it.
        ({"pixel_values": filled(1.0, 1, 3, 4, 4)}, {"pixel_values": filled(1.0, 1, 3, 4, 6)}),
        ({"unheard_of": filled(1.0, 1, 4)}, {"unheard_of": filled(1.0, 1, 5)}),
        ({"unheard_of": filled(1.0, 1, 4)}, {"unheard_of": filled(1.0, 1)}),
        # Told for one of them only.
        (
            {"pixel_values": filled(1.0, 1, 3, 4, 4), "image_sizes": torch.tensor([[4, 4]])},
            {"pixel_values": filled(1.0, 1, 3, 4, 6)},
        ),
        # Tiles of other sizes: the connector counts tokens by them.
        (
            {"pixel_values": filled(1.0, 1, 1, 3, 4, 4), "pixel_attention_mask": filled(1.0, 1, 1, 4, 4)},
            {"pixel_values": filled(1.0, 1, 1, 3, 4, 6), "pixel_attention_mask": filled(1.0, 1, 1, 4, 6)},
        ),
    ],
)
def test_what_does_not_go_together_is_refused(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    name = next(iter(one))
    with pytest.raises(ValueError, match=f"the processor's {name} of several prompts, of shapes"):
        merge_vision([one, other])


# ---- by the models themselves ----

SEEING = [family for family in FAMILIES.values() if family.images]


def pair(*sizes: tuple[int, int]) -> PreferencePair:
    images = tuple(noise_image(width, height, 10 * width + height) for width, height in sizes)
    return PreferencePair((Message("user", "<image>\n" * len(sizes) + "what is it?"),), images, "red", "blue")


def features(model: Any, vision: dict[str, Tensor]) -> Tensor:
    """``[image tokens, hidden]``, image by image, as they replace the image tokens of a row."""
    with torch.no_grad():
        found = model.base_model.get_image_features(**vision).pooler_output
    parts = [found] if isinstance(found, Tensor) else list(found)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


@pytest.mark.parametrize("family", SEEING, ids=lambda family: family.name)
def test_a_row_of_several_prompts_sees_what_each_sees_alone(family: Family) -> None:
    """Shapes that give other grids, other tile counts and other paddings: wide, tall beside square, small."""
    encoder = PairEncoder(family.processor())
    encoded = [encoder.encode(pair(*sizes)) for sizes in ([(112, 40)], [(40, 100), (60, 60)], [(30, 30)])]
    model = family.model(0)
    alone = [features(model, one.vision) for one in encoded]
    together = features(model, merge_vision([one.vision for one in encoded]))
    assert [len(part) for part in alone] == [one.image_tokens for one in encoded]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    # Were the prompts' images alike to the tower, their order would not show.
    assert (alone[0][:2] - alone[1][:2]).abs().max() > 1e-2


@pytest.mark.parametrize("family", SEEING, ids=lambda family: family.name)
def test_each_prompt_alone_is_what_it_was(family: Family) -> None:
    vision = PairEncoder(family.processor()).encode(pair((112, 40), (40, 100))).vision
    assert merge_vision([vision, {}]).keys() == vision.keys()
    assert all(torch.equal(tensor, vision[name]) for name, tensor in merge_vision([{}, vision]).items())
