"""Data sets in Python: arrays and tensors as images, DataFrames, formatted data sets; refusals say what to pass."""

from __future__ import annotations

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vlmpo.data.formats import as_pairs
from vlmpo.errors import DataError, RecordError

PAIR = {"prompt": "Q?", "chosen": "good", "rejected": "bad"}
PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)  # [height, width, 3]


def images_of(value, key="images"):
    return as_pairs([{**PAIR, key: value}])[0].images


@pytest.mark.parametrize("key", ["image", "images", "image_path"])
@pytest.mark.parametrize(
    "value",
    [
        PIXELS,
        [PIXELS],
        PIXELS[None],
        PIXELS.transpose(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        [torch.from_numpy(PIXELS).permute(2, 0, 1)],
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS)[None],
    ],
)
def test_8_bit_arrays_are_images(key, value):
    (image,) = images_of(value, key)
    assert (image.mode, np.array_equal(np.asarray(image), PIXELS)) == ("RGB", True)


def test_arrays_of_other_shapes():
    gray, see_through = PIXELS[..., 0], np.concatenate([PIXELS, PIXELS[..., :1]], axis=2)
    for value in (gray, gray[..., None], torch.from_numpy(gray.copy())[None]):
        (image,) = images_of(value)
        assert (image.mode, np.array_equal(np.asarray(image), gray)) == ("L", True)
    assert images_of(see_through)[0].mode == "RGBA"
    several = images_of(np.stack([PIXELS, PIXELS // 2]))
    assert [np.asarray(image).max() for image in several] == [PIXELS.max(), PIXELS.max() // 2]
    assert len(images_of([PIXELS, Image.new("RGB", (2, 2)), "a.png"])) == 3


@pytest.mark.parametrize(
    "value",
    [
        PIXELS / 255,
        torch.rand(3, 5, 7),
        torch.rand(3, 5, 7, dtype=torch.bfloat16),
        PIXELS.astype(np.int64),
        np.zeros((5, 7, 7), np.uint8),
        PIXELS.tolist(),
        [PIXELS.tolist()],
    ],
)
def test_numbers_that_could_be_meant_otherwise_are_refused(value):
    with pytest.raises(DataError, match=r"train_dataset\[0\]: `images` is .*; pass 8-bit arrays \(uint8"):
        images_of(value)
    # behind the first few records it is a fault of the record
    pairs = as_pairs([PAIR] * 10 + [{**PAIR, "images": value}])
    with pytest.raises(RecordError) as caught:
        pairs[10]
    assert caught.value.reason == "array_image"


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow", None])
def test_a_formatted_data_set_is_the_same(kind):
    rows = [{**PAIR, "images": [{"bytes": b"x", "path": None}], "score": float(at), "n": at} for at in range(3)]
    data = datasets.Dataset.from_list(rows)
    pair = as_pairs(data.with_format(kind))[2]
    assert (pair.prompt[0].text, pair.chosen, pair.images) == ("<image>\nQ?", "good", (b"x",))
    assert pair.metadata == {"score": 2.0, "n": 2}
    narrow = data.with_format(kind, columns=["prompt", "chosen", "rejected"])
    assert (as_pairs(narrow)[2].images, as_pairs(narrow)[2].metadata) == ((), {})


def test_what_a_transform_returns_is_read():
    data = datasets.Dataset.from_list([PAIR] * 2).with_transform(
        lambda batch: {
            **{key: np.array(values, dtype=object) for key, values in batch.items()},
            "images": [PIXELS for _ in batch["prompt"]],
            "ids": [np.arange(3) for _ in batch["prompt"]],
        }
    )
    pair = as_pairs(data)[1]
    assert (pair.prompt[0].text, len(pair.images), pair.metadata) == ("<image>\nQ?", 1, {"ids": [0, 1, 2]})


def test_data_frames():
    messages = [{"role": "user", "content": "Q?"}]
    frame = pd.DataFrame(
        [
            {**PAIR, "images": [Image.new("RGB", (2, 2))], "score": 1.5, "ok": True},
            {**PAIR, "images": None, "score": None, "ok": False},
            {**PAIR, "images": np.array(["a.png"], dtype=object), "score": 2.0, "ok": True},
            {**PAIR, "prompt": np.array(messages, dtype=object), "images": float("nan"), "score": 1.0, "ok": True},
        ],
        index=[7, 7, 3, "x"],
    )
    pairs = as_pairs(frame)
    assert (len(pairs), [len(pairs[at].images) for at in range(4)]) == (4, [1, 0, 1, 0])
    assert [turn.text for turn in pairs[3].prompt] == ["Q?"]
    assert (pairs[1].metadata, pairs[2].images) == ({"score": None, "ok": False}, ("a.png",))
    (image,) = as_pairs(pd.DataFrame([{**PAIR, "image": PIXELS}] * 2))[1].images
    assert image.size == (7, 5)


def test_arrays_under_keys_that_nobody_reads():
    for value in (PIXELS, PIXELS[..., 0], torch.rand(3, 5, 7), [PIXELS]):
        with pytest.raises(RecordError) as caught:
            as_pairs([{**PAIR, "media": value}])[0]
        assert caught.value.reason == "unread_media"
    boxes = np.zeros((2, 4))
    assert as_pairs([{**PAIR, "boxes": boxes, "ids": np.arange(3)}])[0].metadata["boxes"] is boxes


@pytest.mark.parametrize(
    ("data", "kind"),
    [(np.zeros((3, 4)), "ndarray"), (torch.zeros(3, 4), "Tensor"), (["a", "b"], "str"), ([[PAIR]], "list")],
)
def test_what_holds_no_records_is_told_what_to_pass(data, kind):
    with pytest.raises(DataError, match=rf"train_dataset: its first items are of type {kind}; pass a datasets.Dataset"):
        as_pairs(data)


def test_what_has_no_items_by_number_is_told_what_to_pass():
    with pytest.raises(DataError, match=r"train_dataset: Series has no items by number; pass a datasets\.Dataset"):
        as_pairs(pd.Series([PAIR], index=["x"]))
