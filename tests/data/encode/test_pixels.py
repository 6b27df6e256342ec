"""Pixels as bytes: on the device they become, bit by bit, what the model's own processor gives."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from tests.tiny_models import noise_image, processor
from tests.training import trainer
from tests.zoo import FAMILIES, Family
from vlmpo import Message, MPOConfig, MPOTrainer, PreferencePair
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.encode.pixels import AS_BYTES, PixelScale, pixel_scale
from vlmpo.errors import ModelError
from vlmpo.train.batching import lay_out
from vlmpo.tree.vision import merge_vision

SEEING = [family for family in FAMILIES.values() if family.images]
# Other grids, other tile counts, other paddings: wide, tall beside square, small.
PROMPTS = [[(112, 40)], [(40, 100), (60, 60)], [(30, 30)]]


def by_name(family: Family) -> str:
    return family.name


def black(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height))


def pair(*images: Image.Image) -> PreferencePair:
    return PreferencePair((Message("user", "<image>\n" * len(images) + "what is it?"),), images, "red", "blue")


def prompts(make: Any = noise_image) -> list[PreferencePair]:
    seeds = iter(range(10))
    return [pair(*(make(*size, next(seeds)) for size in sizes)) for sizes in PROMPTS]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


# ---- every family ----


@pytest.mark.parametrize("make", [noise_image, lambda width, height, _: black(width, height)], ids=["noise", "black"])
@pytest.mark.parametrize("family", SEEING, ids=by_name)
def test_restored_bytes_are_the_processors_pixels_bit_by_bit(family: Family, make: Any) -> None:
    """Alone and several prompts in a row, whose merging adds padding of its own."""
    own = PairEncoder(family.processor())
    packed = own.for_loader()
    assert packed.pixel_scale is not None
    expected, bytes_ = ([encoder.encode(one) for one in prompts(make)] for encoder in (own, packed))
    for one, other in zip(expected, bytes_, strict=True):
        assert other.vision["pixel_values"].dtype == torch.uint8
        assert one.vision["pixel_values"].dtype == torch.float32
        assert equal(packed.pixel_scale.normalise(other.vision), one.vision)
        assert (one.tiles, one.image_tokens) == (other.tiles, other.image_tokens)
        assert torch.equal(one.prompt_ids, other.prompt_ids)
        assert torch.equal(one.chosen_ids, other.chosen_ids)
    merged = merge_vision([one.vision for one in expected])
    assert equal(packed.pixel_scale.normalise(merge_vision([one.vision for one in bytes_])), merged)


@pytest.mark.parametrize("family", SEEING, ids=by_name)
def test_a_quarter_of_the_bytes(family: Family) -> None:
    """Idefics3's mask, int64 at the processor, becomes bytes too."""

    def size(as_bytes: bool) -> int:
        encoder = PairEncoder(family.processor())
        vision = (encoder.for_loader() if as_bytes else encoder).encode(prompts()[0]).vision
        return sum(vision[name].nbytes for name in ("pixel_values", "pixel_attention_mask") if name in vision)

    assert 4 * size(True) <= size(False)


@pytest.mark.parametrize(("name", "rows"), [("llava-next", 0), ("pixtral", 1), ("mistral3", 1), ("idefics3", None)])
def test_padding_is_no_colour(name: str, rows: int | None) -> None:
    """Padding is 0 after normalising, where black is not: left out, the step that restores it would show."""
    encoder = PairEncoder(FAMILIES[name].processor()).for_loader()
    scale = encoder.pixel_scale
    assert scale is not None
    merged = merge_vision([encoder.encode(one).vision for one in prompts(lambda w, h, _: black(w, h))[:2]])
    if rows is None:  # its processor pads in no layout of the tests: two pictures of which one is padding
        merged["pixel_attention_mask"][:, -1] = 0
    restored = scale.normalise(merged)["pixel_values"]
    naive = scale._normalise_pixels(merged["pixel_values"])
    assert (naive != 0).all()
    assert (restored == 0).any()
    assert (restored != 0).any()
    padding = scale._padding(merged)
    assert padding is not None
    assert torch.equal(restored == 0, padding.expand_as(restored))
    assert torch.equal(restored[restored != 0], naive[restored != 0])


def test_the_formula_by_hand() -> None:
    """All bytes of all colours, in float64, and as the fast processors compute it: mean * 255 and std * 255 fused."""
    scale = pixel_scale(processor())
    assert scale is not None
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    restored = scale.normalise({"pixel_values": values})["pixel_values"]
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (scale.mean, scale.std))
    exact = (values[0].double() / 255 - mean) / std
    assert (restored[0].double() - exact).abs().max() < 1e-6
    own = processor().image_processor
    fused = own.rescale_and_normalize(values, True, own.rescale_factor, True, own.image_mean, own.image_std)
    assert torch.equal(restored, fused)
    other = dataclasses.replace(scale, rescale=1 / 256)  # a scale that many a script takes instead
    assert (other.normalise({"pixel_values": values})["pixel_values"] - fused).abs().max() > 1e-3


def test_floats_stay_as_they_are() -> None:
    scale = pixel_scale(processor())
    assert scale is not None
    vision = {"pixel_values": torch.rand(1, 3, 4, 4)}
    assert scale.normalise(vision) is vision
    assert scale.normalise({}) == {}


# ---- processors that do not leave their last step out ----


class Odd:
    """The tiny InternVL's processor, with a change of its own to the pixels."""

    def __init__(self, change: Any) -> None:
        self.__dict__.update(copy.copy(processor()).__dict__)
        self.change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(processor(), name)

    def __call__(self, **arguments: Any) -> BatchFeature:
        return self.change(arguments)


def ignores_the_switch(arguments: dict[str, Any]) -> BatchFeature:
    settings = {k: v for k, v in arguments["images_kwargs"].items() if k not in AS_BYTES}
    return processor()(**{**arguments, "images_kwargs": settings})


def sharpens(arguments: dict[str, Any]) -> BatchFeature:
    found = processor()(**arguments)
    if found["pixel_values"].dtype == torch.float32:
        found["pixel_values"] = found["pixel_values"] + 1e-6  # of the order of one unit in the last place
    return found


def refuses(arguments: dict[str, Any]) -> BatchFeature:
    if "do_rescale" in arguments["images_kwargs"]:
        raise TypeError("unexpected keyword do_rescale")
    return processor()(**arguments)


@pytest.mark.parametrize("change", [ignores_the_switch, sharpens, refuses])
def test_a_processor_that_is_not_exact_keeps_its_floats(change: Any) -> None:
    encoder = PairEncoder(Odd(change)).for_loader()
    assert encoder.pixel_scale is None
    asked = pair(noise_image(112, 40, 0))
    assert equal(encoder.encode(asked).vision, PairEncoder(Odd(change)).encode(asked).vision)
    assert encoder.encode(asked).vision["pixel_values"].dtype == torch.float32


def test_processors_without_either_step_or_without_images_keep_their_own() -> None:
    assert pixel_scale(FAMILIES["llama-text"].processor()) is None
    plain = copy.copy(processor())
    plain.image_processor = copy.deepcopy(plain.image_processor)
    plain.image_processor.do_normalize = False
    assert pixel_scale(plain) is None


def test_pixels_that_turn_out_to_be_no_bytes_stop_the_run() -> None:
    scale = PixelScale((0.5,) * 3, (0.5,) * 3, 1 / 255)
    whole = torch.tensor([0.0, 255.0]).view(1, 1, 1, 2)
    assert scale.pack({"pixel_values": whole})["pixel_values"].tolist() == [[[[0, 255]]]]
    for wrong in (0.5, -1.0, 256.0, float("nan")):
        with pytest.raises(ModelError, match="no bytes"):
            scale.pack({"pixel_values": torch.tensor([0.0, wrong]).view(1, 1, 1, 2)})


def test_bytes_and_floats_do_not_go_into_one_row() -> None:
    parts = [{"pixel_values": torch.zeros(1, 3, 2, 2, dtype=dtype)} for dtype in (torch.uint8, torch.float32)]
    with pytest.raises(ValueError, match="bytes of one and floats of another"):
        merge_vision(parts)


def test_the_encoder_can_be_sent_to_workers() -> None:
    encoder = PairEncoder(processor()).for_loader()
    again = pickle.loads(pickle.dumps(encoder))
    asked = pair(noise_image(112, 40, 0))
    assert again.pixel_scale == encoder.pixel_scale
    assert equal(again.encode(asked).vision, encoder.encode(asked).vision)


# ---- what the vision tower sees ----


def seen_by(model: Any, act: Any) -> list[Tensor]:
    """The pixels that ``model`` is given while ``act`` runs."""
    seen: list[Tensor] = []
    plain = model.base_model.get_image_features

    def listening(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(pixel_values.detach().clone())
        return plain(pixel_values, *args, **kwargs)

    model.base_model.get_image_features = listening
    try:
        act()
    finally:
        del model.base_model.get_image_features
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"),
    [("internvl-qwen2", 0), ("internvl-qwen2", 1), ("idefics3", 0), ("pixtral", 0), ("qwen2.5-vl", 0)],
)
def test_training_checking_and_evaluating_read_the_processors_pixels(name: str, workers: int, tmp_path: Path) -> None:
    family = FAMILIES[name]
    data, model, own_processor = prompts()[:2], family.model(0), family.processor()
    args = MPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        train_sampling_strategy="sequential",
        dataloader_num_workers=workers,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    run = MPOTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=own_processor)
    own = [PairEncoder(own_processor).encode(one).vision for one in data]
    row, alone = merge_vision(own)["pixel_values"], own[0]["pixel_values"]
    checked = seen_by(model, run._check_rows)
    assert len(checked) >= 3  # shared, and each response alone, by us and by the model itself
    assert all(torch.equal(pixels, alone) for pixels in checked)
    for act in (run.train, run.evaluate):
        seen = seen_by(model, act)
        assert seen
        assert all(any(torch.equal(pixels, known) for known in (row, alone)) for pixels in seen)
        assert any(torch.equal(pixels, row) for pixels in seen)


def test_generating_reads_the_same_pixels() -> None:
    from vlmpo.generate.base import GenerationRequest, Sampling
    from vlmpo.generate.local import LocalEngine

    family, image = FAMILIES["internvl-qwen2"], noise_image(112, 40, 0)
    model = family.model(0)
    engine = LocalEngine(model, family.processor(), Sampling(temperature=0.0, max_new_tokens=2))
    request = GenerationRequest((Message("user", "<image>\nwhat is it?"),), (image,), n=1, seed=0)
    seen = seen_by(model, lambda: list(engine.generate([request])))
    encoder = PairEncoder(family.processor()).for_loader()
    assert encoder.pixel_scale is not None
    restored = encoder.pixel_scale.normalise(encoder.encode(pair(image)).vision)["pixel_values"]
    assert len(seen) == 1
    assert torch.equal(seen[0], restored)
    assert np.ptp(restored.numpy()) > 1


def test_bytes_that_were_not_restored_are_refused(tmp_path: Path) -> None:
    """InternVL would read them as if normalised. The trainer's own encoder gives floats, for whoever asks it."""
    run = trainer(tmp_path, [])
    encoded = run.loader_encoder.encode(pair(noise_image(112, 40, 0)))
    ids = encoded.prompt_ids[None]
    for act in (
        lambda: run.model(input_ids=ids, pixel_values=encoded.vision["pixel_values"]),
        lambda: run.model(packed_rows=lay_out([encoded]).rows),
    ):
        with pytest.raises(ModelError, match="pixels as bytes"):
            act()
    assert run.encoder.encode(pair(noise_image(112, 40, 0))).vision["pixel_values"].dtype == torch.float32
