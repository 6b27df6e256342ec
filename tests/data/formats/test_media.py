"""Images and videos under any name and in any form: read, or refused by name; never left out in silence."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.formats.test_formats import only, open_records, refused, said
from tests.tiny_models import noise_image
from vlmpo.data.formats import FORMATS, RecordContext
from vlmpo.data.formats import media as media_module
from vlmpo.data.index.filter import screen
from vlmpo.errors import RecordError

PAIR = {"question": "Q?", "chosen": "good", "rejected": "bad"}


def png(size: int = 20) -> bytes:
    buffer = io.BytesIO()
    noise_image(size, size, 0).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    noise_image(20, 20, 0).save(buffer, "JPEG")
    return buffer.getvalue()


def parse(record: dict[str, Any]) -> Any:
    return FORMATS["mmpr"].parse(record, RecordContext("f:1", image_root="/root"))


def fault(record: dict[str, Any]) -> RecordError:
    with pytest.raises(RecordError) as caught:
        parse(record)
    return caught.value


# --- other names


@pytest.mark.parametrize(
    "key",
    [
        "image_path",
        "img_path",
        "image_url",
        "img",
        "imgs",
        "image_paths",
        "images_path",
        "picture",
        "photo_file",
        "imagePath",
        "imageUrl",
        "Image",
        "IMAGES",
        "image-file",
        "image_filename",
    ],
)
@pytest.mark.parametrize("value", ["0.png", ["0.png"]])
def test_an_image_under_another_name_is_read(key: str, value: Any) -> None:
    pair = parse({**PAIR, key: value, "image": None})
    assert (pair.images, pair.prompt[0].text, pair.metadata) == (("/root/0.png",), "<image>\nQ?", {})


@pytest.mark.parametrize("key", ["video_path", "videoUrl", "video_files", "Video"])
def test_a_video_under_another_name_is_read(key: str) -> None:
    pair = parse({**PAIR, key: "0.mp4"})
    assert (pair.videos, pair.prompt[0].text) == (("/root/0.mp4",), "<video>\nQ?")


@pytest.mark.parametrize("name", ["trl", "trl_implicit", "sharegpt", "alpaca", "swift", "rlhf_v"])
def test_other_names_are_read_in_every_format(name: str) -> None:
    turns = [said("user", "Q?"), said("assistant", "good")]
    record = {
        "trl": {"prompt": "Q?", "chosen": "good", "rejected": "bad"},
        "trl_implicit": {"chosen": turns, "rejected": [turns[0], said("assistant", "bad")]},
        "sharegpt": {"conversations": turns[:1], "chosen": turns[1], "rejected": said("assistant", "bad")},
        "alpaca": {"instruction": "Q?", "chosen": "good", "rejected": "bad"},
        "swift": {"messages": turns, "rejected_response": "bad"},
        "rlhf_v": {"text": json.dumps(PAIR)},
    }[name]
    for key in ("image_path", "img", "imageUrl"):
        pair = FORMATS[name].parse({**record, key: "0.png"}, RecordContext("f:1"))
        assert pair.images == ("0.png",)
    for key in ("imgae", "file_name", "media"):
        with pytest.raises(RecordError) as caught:
            FORMATS[name].parse({**record, key: "0.png"}, RecordContext("f:1"))
        assert caught.value.reason == "unread_media"


def test_beside_an_image_that_was_read_they_are_metadata() -> None:
    for more in ({"image_path": "data/1.png"}, {"img_url": "https://a.net/1.png"}, {"video_path": "x.mp4"}):
        pair = parse({**PAIR, "image": {"bytes": png(), "path": None}, "imgae": "x.png", **more})
        assert (pair.images, pair.videos, pair.metadata) == ((png(),), (), {"imgae": "x.png", **more})


def test_two_other_names_must_say_the_same() -> None:
    assert parse({**PAIR, "image_path": "a.png", "img": "a.png"}).images == ("/root/a.png",)
    for record in (
        {"image_path": "a.png", "img": "b.png"},
        {"image_path": "a.png", "image_url": "https://a.net/b.png"},
        {"video_path": "a.mp4", "videoFile": "b.mp4"},
    ):
        assert fault({**PAIR, **record}).reason in ("ambiguous_field", "missing_image")
    assert "`image_path` and `img`" in fault({**PAIR, "image_path": "a.png", "img": "b.png"}).detail


# --- what nobody reads


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("imgae", "0.png"),
        ("imagess", ["0.png"]),
        ("iamges", "0"),
        ("imges", {"path": "0"}),
        ("vidoe", "0.mp4"),
        ("image2", "0.png"),
        ("file_name", "0.png"),
        ("media", "my pictures/0 1.JPEG"),
        ("media", "https://a.net/0.webp?size=3"),
        ("media", ["clip.mkv"]),
        ("media", "data:image/png;base64,AAAA"),
        ("media", base64.b64encode(png()).decode()),
        ("media", png()),
        ("media", {"bytes": png(), "path": None}),
        ("media", Image.new("RGB", (2, 2))),
        ("meta", {"files": [{"path": "0.png"}]}),
    ],
)
def test_what_looks_like_media_is_refused_by_name(key: str, value: Any) -> None:
    error = fault({**PAIR, key: value})
    assert (error.reason, f"`{key}` seems to hold" in error.detail) == ("unread_media", True)


@pytest.mark.parametrize(
    "more",
    [
        {"imgae": None},
        {"imgae": ""},
        {"imagess": [None]},
        {"media": "a drawing"},
        {"id": "image-17", "image_id": "000000033471", "ds_name": "RLAIF-V"},
        {"source": "https://a.net/page.html", "file": "pairs.jsonl"},
        {"pages": 3, "usage": {"images": 0}, "score": 0.5},
    ],
)
def test_what_does_not_is_metadata(more: dict[str, Any]) -> None:
    assert parse({**PAIR, **more}).metadata == more


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"role": "user", "content": "Q?", "images": ["0.png"]}, "prompt[0].images"),
        ({"role": "user", "content": "Q?", "img_path": "0"}, "prompt[0].img_path"),
        ({"role": "user", "content": "Q?", "attachment": "0.png"}, "prompt[0].attachment"),
        ({"role": "user", "content": [{"type": "text", "text": "Q?", "image": "0.png"}]}, "prompt[0].content[0].image"),
    ],
)
def test_media_within_a_message_are_not_lost(message: dict[str, Any], where: str) -> None:
    record = {"prompt": [message], "chosen": "good", "rejected": "bad"}
    with pytest.raises(RecordError) as caught:
        FORMATS["trl"].parse(record, RecordContext("f:1"))
    assert (caught.value.reason, f"`{where}`" in caught.value.detail) == ("unread_media", True)
    # a record whose images were read may repeat their names in its messages
    assert FORMATS["trl"].parse({**record, "images": ["0.png"]}, RecordContext("f:1")).images == ("0.png",)


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image_url", "image_url": {"url": "0.png"}},
        {"type": "image_url", "image_url": "0.png"},
        {"type": "image_url", "image_url": {"url": "0.png", "detail": "low"}},
        {"type": "image", "url": "0.png"},
        {"type": "image", "path": "0.png"},
    ],
)
def test_items_of_messages_hold_images_in_many_ways(item: dict[str, Any]) -> None:
    content = [item, {"type": "text", "text": "Q?"}]
    record = {"prompt": [said("user", content)], "chosen": "good", "rejected": "bad", "image_path": "other.png"}
    pair = FORMATS["trl"].parse(record, RecordContext("f:1"))
    assert (pair.images, pair.prompt[0].text) == (("0.png",), "<image>\nQ?")
    assert pair.metadata == {"image_path": "other.png"}


def test_items_of_messages_hold_base64_and_videos() -> None:
    encoded = base64.b64encode(png()).decode()
    items = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "image", "base64": encoded},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded}},
        {"type": "video_url", "video_url": {"url": "v.mp4"}},
    ]
    record = {"prompt": [said("user", items)], "chosen": "good", "rejected": "bad"}
    pair = FORMATS["trl"].parse(record, RecordContext("f:1"))
    assert (pair.images, pair.videos) == ((png(), png(), png()), ("v.mp4",))


# --- forms


@pytest.mark.parametrize("value", [None, "", [], [None], [""], [{}], [None, None], [{"bytes": None, "path": None}], {}])
@pytest.mark.parametrize("key", ["image", "images", "image_path"])
def test_nothing_is_no_image(key: str, value: Any) -> None:
    pair = parse({**PAIR, key: value})
    assert (pair.images, pair.prompt[0].text) == ((), "Q?")


@pytest.mark.parametrize(
    "written",
    [
        lambda text: f"data:image/png;base64,{text}",
        lambda text: f"data:image/png;name=a.png;base64,{text}",
        lambda text: text,
        lambda text: "\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
        lambda text: text.rstrip("="),
        lambda text: f"data:;base64,{text.translate(str.maketrans('+/', '-_'))}",
        lambda text: {"bytes": text, "path": None},
        lambda text: [{"bytes": f"data:image/png;base64,{text}"}],
    ],
)
@pytest.mark.parametrize("content", [png(), png(21), jpeg()])
def test_base64_is_decoded(written: Any, content: bytes) -> None:
    assert parse({**PAIR, "image": written(base64.b64encode(content).decode())}).images == (content,)


def test_percent_escapes_of_a_data_url_are_decoded() -> None:
    assert parse({**PAIR, "image": "data:image/svg+xml,%3Csvg%20/%3E"}).images == (b"<svg />",)


def test_too_much_base64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = base64.b64encode(png()).decode()
    monkeypatch.setattr(media_module, "MAX_ENCODED_BYTES", len(png()) - 1)
    for value in (text, f"data:image/png;base64,{text}", {"bytes": text}):
        error = fault({**PAIR, "image": value})
        assert (error.reason, "are read; save it as a file" in error.detail) == ("too_large", True)


@pytest.mark.parametrize("value", ["data:image/png;base64,A*", {"bytes": "b'\\x89PNG'"}, {"base64": "no base64!"}])
def test_bad_base64_is_refused(value: Any) -> None:
    error = fault({**PAIR, "image": value})
    assert (error.reason, "is not valid base64" in error.detail) == ("undecodable_image", True)


@pytest.mark.parametrize(
    ("address", "path"),
    [("file:///a/b%20c.png", "/a/b c.png"), ("file://localhost/a.png", "/a.png"), ("/9j/a.png", "/9j/a.png")],
)
def test_file_addresses(address: str, path: str) -> None:
    assert parse({**PAIR, "image": address}).images == (path,)


@pytest.mark.parametrize("address", ["file://[bad", "file://host/a.png", "file://a.png", "file://[::1"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_file_addresses_that_name_no_file_here(address: str, kind: str) -> None:
    assert fault({**PAIR, kind: address}).reason == f"missing_{kind}"


# --- messages


LONG = "Ab3/" * 3000


@pytest.mark.parametrize(
    "image",
    [
        LONG,
        f"iVBORw0KGgo{LONG}*",
        f"data:image/png;base64,{LONG}*",
        f"https://a.net/{LONG}",
        f"file://[{LONG}",
        f"file://{LONG}",
        {"bytes": f"{LONG}*"},
        {"at": LONG},
        "a" * 300 + ".png",
    ],
)
def test_a_message_shows_80_characters_of_a_value(tmp_path: Path, image: Any) -> None:
    (dropped,) = screen(open_records(tmp_path, {**PAIR, "image": image})).dropped
    for start in range(0, 200):
        assert LONG[start : start + 81] not in dropped.detail
    assert "a" * 81 not in dropped.detail
    assert len(dropped.detail) < 400 + len(str(tmp_path))


def test_a_long_path_shows_the_folder_that_exists_whole(tmp_path: Path) -> None:
    folder = tmp_path / ("f" * 90)
    folder.mkdir()
    data = open_records(tmp_path, {**PAIR, "image": f"{'f' * 90}/none.png"})
    assert f"image {folder}/none.png does not exist" in screen(data).dropped[0].detail


def test_a_lone_surrogate_in_a_path_can_be_printed(tmp_path: Path) -> None:
    (dropped,) = screen(open_records(tmp_path, {**PAIR, "image": "a\ud83d.png"})).dropped
    error = RecordError(dropped.reason, dropped.origin, dropped.detail)
    assert (dropped.reason, r"a\ud83d.png" in str(error).encode("utf-8").decode()) == ("missing_image", True)


def test_a_wrong_prompt_image_count_still_is(tmp_path: Path) -> None:
    assert refused(open_records(tmp_path, {**PAIR, "image_paths": ["a.png", "b.png"]}))[0] == "placeholder_mismatch"
    assert only(open_records(tmp_path, {**PAIR, "question": "<image> or <image>?", "imgs": ["a.png", "b.png"]})).images
