"""PreferencePair's JSON form."""

import dataclasses
import json

import pytest

from vlmpo.data.records import Message, PreferencePair

PAIR = PreferencePair(
    prompt=(Message("system", "Be brief."), Message("user", "<image>\n<image>\n<video>\nWhich is larger?")),
    images=("/data/a.png", "/data/b.png"),
    chosen="The first.",
    rejected="Die zweite – ü 😀",
    source="sizes",
    origin="/data/sizes.jsonl:7",
    max_tiles=6,
    metadata={"id": 3, "tags": ["x", None]},
    videos=("/data/c.mp4",),
    chosen_complete=True,
    rejected_complete=False,
    as_sampled=True,
)

AS_JSON = {
    "prompt": [
        {"role": "system", "text": "Be brief."},
        {"role": "user", "text": "<image>\n<image>\n<video>\nWhich is larger?"},
    ],
    "images": ["/data/a.png", "/data/b.png"],
    "chosen": "The first.",
    "rejected": "Die zweite – ü 😀",
    "source": "sizes",
    "origin": "/data/sizes.jsonl:7",
    "max_tiles": 6,
    "metadata": {"id": 3, "tags": ["x", None]},
    "videos": ["/data/c.mp4"],
    "chosen_complete": True,
    "rejected_complete": False,
    "as_sampled": True,
}


def test_json_form_is_the_documented_one() -> None:
    assert PAIR.to_json() == AS_JSON


def test_round_trip_through_text() -> None:
    assert PreferencePair.from_json(json.loads(json.dumps(PAIR.to_json()))) == PAIR


def test_fine_tuning_record_round_trips_with_its_defaults() -> None:
    pair = PreferencePair(prompt=(Message("user", "Hi"),), images=(), chosen="Hello", rejected=None)
    again = PreferencePair.from_json(json.loads(json.dumps(pair.to_json())))
    assert again == pair
    assert (again.rejected, again.source, again.origin, again.max_tiles, again.metadata) == (None, "data", "", None, {})
    assert (again.chosen_complete, again.rejected_complete, again.as_sampled) == (None, None, False)


def test_from_json_needs_only_the_fields_without_default() -> None:
    record = {"prompt": [{"role": "user", "text": "Hi"}], "images": [], "chosen": "a", "rejected": "b"}
    assert PreferencePair.from_json(record) == PreferencePair((Message("user", "Hi"),), (), "a", "b")


def test_embedded_image_has_no_json_form() -> None:
    pair = dataclasses.replace(PAIR, images=("/data/a.png", b"\x89PNG"))
    with pytest.raises(TypeError, match="this pair holds a bytes"):
        pair.to_json()


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAIR.chosen = "changed"  # type: ignore[misc]
