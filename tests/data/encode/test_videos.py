"""Videos as frames: which frames, where they stand in the prompt, and what is said of a video that cannot be read."""

from __future__ import annotations

import io
import json
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.tiny_models import model, noise_image, processor, tokenizer
from tests.training import logged
from vlmpo.cli import app
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.encode.videos import read_frames, with_frames
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import DataError, RecordError

av = pytest.importorskip("av", reason="the video extra is not installed")

STEP = 10  # gray levels from one frame to the next


def video(frames: int, width: int = 64, height: int = 48, corner: bool = False, gop: int = 12) -> bytes:
    """An MP4 of ``frames`` gray pictures, each STEP brighter; with ``corner`` the upper left quarter is white."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"g": str(gop), "qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = np.full((height, width, 3), index * STEP, np.uint8)
            if corner:
                picture[: height // 2, : width // 2] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def frame_numbers(frames: list) -> list[int]:
    return [round(np.asarray(frame).mean() / STEP) for frame in frames]


@pytest.mark.parametrize(
    ("frames", "wanted", "expected"),
    [
        (20, 4, [2, 7, 12, 17]),  # the middles of [0, 5), [5, 10), [10, 15), [15, 20)
        (20, 1, [10]),
        (20, 20, list(range(20))),
        (3, 8, [0, 1, 2]),  # no frame twice
        (1, 8, [0]),
    ],
)
def test_frames_are_taken_evenly(frames: int, wanted: int, expected: list[int]) -> None:
    assert frame_numbers(read_frames(video(frames), wanted)) == expected


def test_a_path_reads_as_its_bytes(tmp_path) -> None:
    content = video(6)
    (tmp_path / "v.mp4").write_bytes(content)
    paths = read_frames(tmp_path / "v.mp4", 3)
    assert [np.asarray(f).tolist() for f in paths] == [np.asarray(f).tolist() for f in read_frames(content, 3)]


def test_a_turned_telephone_is_turned_back() -> None:
    """The track header says: turn by a quarter, clockwise. What was the upper left corner is then the upper right."""
    content = bytearray(video(2, corner=True))
    at = content.index(b"tkhd") + 4 + 40  # version, flags, times, id, ..., then the matrix
    one = 0x10000
    assert struct.unpack(">9i", content[at : at + 36])[:5] == (one, 0, 0, 0, one)
    content[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 0x40000000)
    (frame,) = read_frames(bytes(content), 1)
    assert frame.size == (48, 64)
    pixels = np.asarray(frame).mean(axis=2)
    assert pixels[:30, 26:].mean() > 230
    assert pixels[:30, :22].mean() < 40
    assert pixels[34:].mean() < 40


def test_frames_stand_where_the_video_stood() -> None:
    still, other = noise_image(20, 20, 0), noise_image(20, 20, 1)
    pair = PreferencePair(
        (
            Message("system", "Be brief."),
            Message("user", "Before <image>\n<video>\nwhat moves, and is it in <image>?"),
        ),
        (still, other),
        "a",
        "b",
        videos=(video(2),),
    )
    shown = with_frames(pair, 8)
    assert shown.videos == ()
    assert shown.prompt[0] == pair.prompt[0]
    assert shown.prompt[1].text == (
        "Before <image>\nFrame1: <image>\nFrame2: <image>\nwhat moves, and is it in <image>?"
    )
    assert shown.images[0] is still
    assert frame_numbers(list(shown.images[1:3])) == [0, 1]
    assert shown.images[3] is other
    assert replace(shown, prompt=pair.prompt, images=pair.images, videos=pair.videos) == pair


def test_a_video_is_encoded_as_its_frames_are() -> None:
    encoder = PairEncoder(processor(), video_frames=3)
    pair = PreferencePair((Message("user", "<video>\nhow many?"),), (), "two", "three", videos=(video(9),))
    frames = tuple(read_frames(video(9), 3))
    assert frame_numbers(list(frames)) == [1, 4, 7]
    text = "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nhow many?"
    same = encoder.encode(PreferencePair((Message("user", text),), frames, "two", "three"))
    encoded = encoder.encode(pair)
    assert encoded.prompt_ids.tolist() == same.prompt_ids.tolist()
    assert (encoded.vision["pixel_values"] == same.vision["pixel_values"]).all()
    assert "Frame3: <img>" in tokenizer().decode(encoded.prompt_ids)


def reason(pair: PreferencePair) -> RecordError:
    with pytest.raises(RecordError) as caught:
        PairEncoder(processor()).encode(pair)
    return caught.value


@pytest.mark.parametrize(
    ("text", "images", "videos", "expected"),
    [
        ("<video>\n<video>\nwhat?", 0, 1, "placeholder_mismatch"),
        ("what?", 0, 1, "placeholder_mismatch"),
        ("<video> <image>", 0, 1, "placeholder_mismatch"),
        ("<video>", 1, 1, "placeholder_mismatch"),
        ("a word: <video>", 0, 0, "control_token_in_text"),
    ],
)
def test_placeholders_must_fit(text: str, images: int, videos: int, expected: str) -> None:
    pair = PreferencePair(
        (Message("user", text),),
        tuple(noise_image(20, 20, i) for i in range(images)),
        "a",
        "b",
        origin="p.jsonl:4",
        videos=(video(2),) * videos,
    )
    error = reason(pair)
    assert (error.reason, error.origin) == (expected, "p.jsonl:4")


def test_a_video_that_cannot_be_read_is_refused_by_name(tmp_path) -> None:
    def pair(source) -> PreferencePair:
        return PreferencePair((Message("user", "<video>"),), (), "a", "b", origin="p.jsonl:9", videos=(source,))

    missing = reason(pair(str(tmp_path / "no.mp4")))
    assert missing.reason == "missing_video"
    assert "does not exist" in str(missing)
    for damaged in (b"no video at all", video(12)[:200], b""):
        error = reason(pair(damaged))
        assert error.reason == "undecodable_video"
        assert str(error).startswith("p.jsonl:9: video <")


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'vlmpo\[video\]'"):
        read_frames(b"", 1)


@pytest.mark.slow
def test_a_run_on_videos(tmp_path) -> None:
    """MMPR records with `video`, by the command line: read as frames, a missing one counted with its line."""
    checkpoint = tmp_path / "model"
    model().save_pretrained(checkpoint)
    processor().save_pretrained(checkpoint)
    for index in range(2):
        (tmp_path / f"{index}.mp4").write_bytes(video(6 + index))
    lines = [
        {"video": f"{index % 3}.mp4", "question": "<video>\nhow many?", "chosen": f"two {index}", "rejected": "three"}
        for index in range(5)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: {checkpoint}}}\ndata: {{train: [pairs.jsonl], video_frames: 2, max_tiles: 2}}\n"
        f"training: {{output_dir: {tmp_path / 'run'}, per_device_train_batch_size: 4, use_cpu: true, logging_steps: 1,"
        " save_strategy: 'no', disable_tqdm: true}\n"
    )
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    sets = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]["sets"]["pairs"]
    assert (sets["read"], sets["used"], sets["dropped"]) == (5, 4, {"missing_video": 1})
    (line,) = logged(tmp_path / "run")
    assert line["loss"] == pytest.approx(0.8317766 + line["loss/nll"], rel=1e-6)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "recipe.yaml"), "training.output_dir=elsewhere"])
    assert "Frame2: <img>" in shown.output
