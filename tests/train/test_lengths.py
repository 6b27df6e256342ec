"""Estimated lengths of pairs, against those the encoder makes of them; and what such pairs cost."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.commands.test_train import records, write_data
from tests.tiny_models import model as tiny_model
from tests.tiny_models import noise_image, processor, random_pair
from tests.zoo import FAMILIES, Family
from vlmpo.data.dataset import open_pairs
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.encode.images import size_in_header
from vlmpo.data.encode.processors import Size, count_image_tokens
from vlmpo.data.index import store as cache
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import RecordError
from vlmpo.train import lengths
from vlmpo.train.lengths import (
    UNUSABLE,
    LengthEstimator,
    PairLength,
    Rates,
    count_patch_pixels,
    estimate_lengths,
    measure_rates,
    measure_tokens_per_patch,
    pair_costs,
)

SIZES = [(112, 40), (40, 100), (60, 60), (300, 200), (500, 900)]
ALONE: Any = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)
SEEING = [family for family in FAMILIES.values() if family.images]


def estimate(pairs: Any, encoder: PairEncoder) -> np.ndarray:
    """The lengths that a process alone estimates."""
    return estimate_lengths(pairs, encoder=encoder, patch_pixels=14 * 14, accelerator=ALONE)


def picture(width: int, height: int, **changes: Any) -> PreferencePair:
    pair = PreferencePair((Message("user", "<image>\nwhat is it?"),), (noise_image(width, height, 0),), "red", "blue")
    return replace(pair, **changes)


@pytest.mark.parametrize("family", SEEING, ids=lambda family: family.name)
def test_image_tokens_and_patches_of_every_family(family: Family) -> None:
    """Exact where the processor foretells its tokens; it may count the frames too, so by what all pairs come to."""
    encoder = PairEncoder(family.processor(), max_tiles=4)
    pairs = []
    for size in SIZES:
        try:
            encoder.encode(picture(*size))
        except RecordError:  # Mistral 3 refuses the smallest
            continue
        pairs.append(picture(*size))
    encoded = [encoder.encode(pair) for pair in pairs]
    found = LengthEstimator(encoder, measure_rates(encoder, pairs, 14 * 14))
    guessed = [found.estimate(pair).prompt for pair in pairs]
    told = count_image_tokens(encoder.processor, 4, [Size(60, 60)])
    assert (told is None) == (family.name == "smolvlm")
    true = [one.prompt_ids.numel() for one in encoded]
    assert sum(guessed) == pytest.approx(sum(true), abs=len(true))
    if told is not None:
        assert guessed == pytest.approx(true, rel=0.1, abs=2)
        assert sorted(guessed) == [size for _, size in sorted(zip(true, guessed, strict=True))]
    # LLaVA-NeXT reads patches that it then cuts off as padding: not quite in proportion
    patches = [found.estimate(pair).patches for pair in pairs]
    assert sum(patches) == pytest.approx(sum(_patches(one.vision["pixel_values"]) for one in encoded), rel=0.02, abs=3)


def _patches(pixels: torch.Tensor) -> int:
    """By hand: rows of the Qwen-VL list; else pictures of patches of 14 x 14, empty ones behind left out."""
    if pixels.dim() == 2:
        return pixels.shape[0]
    pictures = pixels.flatten(0, -4)
    return sum(bool(one.any()) for one in pictures) * (pixels.shape[-1] * pixels.shape[-2] // 196)


def test_the_sum_by_hand() -> None:
    encoder = PairEncoder(processor(), max_tiles=2)
    found = LengthEstimator(encoder, Rates(bytes_per_token=2.0, overhead=10.0, tokens=0.5, patches=3.0))
    # two tiles and a thumbnail of four tokens, with the two around them: 14, of which half; "what is it?" and a line
    # break are 12 bytes, so 6 tokens; "red" 1.5 and "blue" 2, rounded, each with an end of turn
    assert count_image_tokens(processor(), 2, [Size(40, 112)]) == 14
    assert found.estimate(picture(112, 40)) == PairLength(10 + 6 + 7, (2 + 1) + (2 + 1), 3 * 14)
    assert found.estimate(picture(112, 40, max_tiles=1)) == PairLength(10 + 6 + 3, 6, 3 * 6)
    assert found.estimate(picture(1, 1, images=())) == PairLength(16, 6, 0)
    # é is two bytes
    assert found.estimate(picture(1, 1, images=(), chosen="éé")).responses == 3 + 3
    # a video is eight frames of 448 x 448: each two tiles' budget shared, so one tile
    video = found.estimate(picture(1, 1, images=(), videos=("a.mp4",)))
    assert video.patches == 3 * 8 * 6


def test_supervised_pairs_have_one_response() -> None:
    encoder = PairEncoder(processor(), need_rejected=False)
    found = LengthEstimator(encoder, Rates(2.0, 10.0))
    assert found.estimate(picture(1, 1, images=(), rejected=None)).responses == 3


@pytest.mark.parametrize(
    ("over_long", "length", "expected"),
    [
        ("drop", 117, PairLength(16, 204, 0)),
        ("drop", 100, PairLength(16, 204, 0)),  # near the limit: perhaps it fits
        ("drop", 90, UNUSABLE),
        ("cut", 100, PairLength(16, 84 + 84, 0)),
        ("cut", 60, PairLength(16, 44 + 44, 0)),
        ("cut", 16, UNUSABLE),
    ],
)
def test_what_is_too_long(over_long: Any, length: int, expected: PairLength) -> None:
    encoder = PairEncoder(processor(), max_length=length, over_long=over_long)
    found = LengthEstimator(encoder, Rates(2.0, 10.0))
    assert found.estimate(picture(1, 1, images=(), chosen="r" * 202, rejected="b" * 202)) == expected


def test_headers_and_what_cannot_be_read(tmp_path: Path) -> None:
    noise_image(30, 20, 0).save(tmp_path / "a.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    content = io.BytesIO()
    noise_image(30, 20, 0).save(content, "JPEG")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])  # a header is all that is looked at
    assert size_in_header(str(tmp_path / "a.png")) == (20, 30)
    assert size_in_header(tmp_path / "cut.png") == (20, 30)
    assert size_in_header(content.getvalue()) == (20, 30)
    assert size_in_header(noise_image(30, 20, 0)) == (20, 30)
    found = LengthEstimator(PairEncoder(processor()), Rates())
    for name in ("bad.png", "missing.png", "large.png"):
        assert size_in_header(tmp_path / name) is None
        assert found.estimate(picture(1, 1, images=(str(tmp_path / name),))) == UNUSABLE
    text_only = LengthEstimator(PairEncoder(FAMILIES["qwen2-text"].processor()), Rates())
    assert text_only.estimate(picture(30, 20)) == UNUSABLE
    assert text_only.estimate(picture(30, 20, images=())) != UNUSABLE


def test_nothing_usable_to_measure_by() -> None:
    encoder = PairEncoder(processor())
    assert measure_rates(encoder, [], 196) == Rates()
    assert measure_rates(encoder, [picture(1, 1, images=(), chosen=" ")], 196) == Rates()
    assert estimate([], encoder).shape == (0, 3)


def test_rates_are_measured_on_pairs_from_all_over_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    class Records:
        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: int) -> PreferencePair:
            looked_at.append(index)
            raise RecordError("bad_json", "x", "no")

    monkeypatch.setattr(lengths, "_estimate_share", lambda pairs, indices, estimator: np.zeros((len(indices), 3)))
    estimate(Records(), PairEncoder(processor()))
    assert (len(looked_at), looked_at[0], looked_at[-1]) == (256, 0, 10**6 - 1)


# ---- what it costs ----


class Tower(nn.Module):
    """30 weights of vision, 5 of the projector, 10 of text, 24 in experts, 7 to look up and 7 in the head."""

    def __init__(self, **text: Any) -> None:
        super().__init__()
        self.vision_tower = nn.ParameterDict({"w": nn.Parameter(torch.zeros(30))})
        self.projector = nn.ParameterDict({"w": nn.Parameter(torch.zeros(5))})
        self.layers = nn.ParameterDict({"w": nn.Parameter(torch.zeros(10))})
        if text:
            self.mlp = nn.ModuleDict({"experts": nn.ParameterDict({"w": nn.Parameter(torch.zeros(24))})})
        self.embed_tokens, self.lm_head = nn.Embedding(7, 1), nn.Linear(1, 7, bias=False)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**text), vision_config=None)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_what_a_patch_is_worth_by_hand() -> None:
    model = Tower()
    assert measure_tokens_per_patch(model) == pytest.approx(30 / 10)
    model.vision_tower.requires_grad_(False)  # forward only
    assert measure_tokens_per_patch(model) == pytest.approx(30 / 3 / 10)
    model.layers.requires_grad_(False)  # backward to what lies below it alone
    assert measure_tokens_per_patch(model) == pytest.approx(30 / 3 / (10 * 2 / 3))
    # two of eight experts at a time: 24 / 4 = 6
    assert measure_tokens_per_patch(Tower(num_experts=8, num_experts_per_tok=2)) == pytest.approx(30 / 16)
    assert count_patch_pixels(model) == 14 * 14


def test_what_a_patch_is_worth_in_real_models() -> None:
    model = tiny_model()
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ("projector", "embed_tokens", "lm_head")):
            sizes["vision_tower" in name] += parameter.numel()
    assert measure_tokens_per_patch(model) == pytest.approx(sizes[True] / sizes[False])
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=".*vision.*"))
    assert measure_tokens_per_patch(adapted) == pytest.approx(sizes[True] / (2 * sizes[False]), rel=0.25)
    with torch.device("meta"):
        qwen = AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen2_5_vl"))
    assert count_patch_pixels(qwen) == 14 * 14
    assert 0 < measure_tokens_per_patch(qwen) < 1


def test_costs_by_hand() -> None:
    sizes = np.array([[100, 50, 400], [30, 20, 0], [0, 0, 0]], np.int32)
    shared = pair_costs(sizes, tokens_per_patch=0.25, num_responses=2, shared=True)
    assert shared.pair.tolist() == [100 + 50 + 100, 50, 0]
    assert shared.prompt.tolist() == [200, 30, 0]
    # each response with a prompt of its own, and nothing saved by standing together
    separate = pair_costs(sizes, tokens_per_patch=0.25, num_responses=2, shared=False)
    assert separate.pair.tolist() == [2 * 200 + 50, 2 * 30 + 20, 0]
    assert separate.prompt.tolist() == [0, 0, 0]


def test_lengths_of_a_data_set_bad_records_among_it() -> None:
    class Records(list):
        def __getitem__(self, index: int) -> PreferencePair:
            if index == 1:
                raise RecordError("bad_json", "x:2", "no")
            return super().__getitem__(index)

    encoder = PairEncoder(processor())
    pairs = Records(random_pair(i, images=i % 3) for i in range(6))
    found = estimate(pairs, encoder)
    assert found.dtype == np.int32
    assert found[1].tolist() == [0, 0, 0]
    usable = [pairs[i] for i in (0, 2, 3, 4, 5)]
    estimator = LengthEstimator(encoder, measure_rates(encoder, usable, 196))
    assert found[[0, 2, 3, 4, 5]].tolist() == [list(estimator.estimate(pair)) for pair in usable]


def test_lengths_of_a_data_set_in_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MIN_BYTES", 0)
    monkeypatch.setenv("VLMPO_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path, records(9))
    estimated: list[str] = []
    plain = LengthEstimator.estimate

    def counted(self: LengthEstimator, pair: PreferencePair) -> PairLength:
        estimated.append(pair.origin)
        return plain(self, pair)

    monkeypatch.setattr(LengthEstimator, "estimate", counted)

    def found(of_set: int | None = None, **settings: Any) -> np.ndarray:
        estimated.clear()
        pairs = open_pairs([SourceSpec(str(tmp_path / "set" / "meta.json"), max_tiles=of_set)])
        return estimate(pairs, PairEncoder(processor(), **settings))

    first = found()
    assert first.all()
    assert len(set(estimated)) == len(estimated) == 9
    assert np.array_equal(found(), first)
    assert estimated == []
    assert np.array_equal(found(max_tiles=2), first)  # the processor's own number
    assert estimated == []
    found(max_tiles=1)
    assert len(estimated) == 9
    found(of_set=6, max_tiles=2)  # keeps to two
    found(of_set=6)
    assert len(estimated) == 9
    for entry in (tmp_path / "cache").glob("sizes-*.arrow"):
        entry.write_bytes(entry.read_bytes()[:-3])
    assert np.array_equal(found(), first)
    assert len(estimated) == 9
    with (tmp_path / "set" / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(records(9)[0]) + "\n")
    assert len(found()) == len(estimated) == 10
    assert len(list((tmp_path / "cache").glob("sizes-*.arrow"))) == 1  # those of the earlier state are gone


def test_a_notice_if_it_takes_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(lengths, "_NOTICE_EVERY", -1.0)
    estimate([random_pair(i) for i in range(4)], PairEncoder(processor()))
    assert "to share them out evenly: 50%" in capsys.readouterr().err
