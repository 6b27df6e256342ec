"""Turns a video into frames, for any model that reads several images.

Frames are taken from the middles of equal stretches of the video. In the prompt they are written as InternVL writes
them: ``Frame1: <image>``, a line each.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from vlmpo.data.encode.chat_template import check_placeholders
from vlmpo.data.encode.images import missing_file
from vlmpo.data.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, PreferencePair
from vlmpo.errors import DataError, RecordError, shorten_path

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_FRAMES = 8


def with_frames(pair: PreferencePair, max_frames: int = DEFAULT_FRAMES) -> PreferencePair:
    """Return ``pair`` with at most ``max_frames`` images in place of each ``<video>``, and without videos.

    Raises:
        RecordError: ``placeholder_mismatch``, ``missing_video`` or ``undecodable_video``.
        DataError: the library that reads videos is not installed.
    """
    check_placeholders(pair.prompt, VIDEO_PLACEHOLDER, pair.videos, pair.origin)
    check_placeholders(pair.prompt, IMAGE_PLACEHOLDER, pair.images, pair.origin)
    videos, still_images = iter(pair.videos), iter(pair.images)
    images: list[Any] = []
    prompt = []
    for message in pair.prompt:
        text = ""
        for number, part in enumerate(message.text.split(VIDEO_PLACEHOLDER)):
            if number:  # every part but the first follows a video
                frames = read_frames(next(videos), max_frames, pair.origin)
                images += frames
                text += "".join(f"Frame{count}: {IMAGE_PLACEHOLDER}\n" for count in range(1, len(frames) + 1))
                part = part.removeprefix("\n")
            images += islice(still_images, part.count(IMAGE_PLACEHOLDER))
            text += part
        prompt.append(replace(message, text=text))
    return replace(pair, prompt=tuple(prompt), images=tuple(images), videos=())


def read_frames(source: str | os.PathLike[str] | bytes, max_frames: int, origin: str = "") -> list[Image.Image]:
    """Return at most ``max_frames`` upright RGB frames of a video, in order; all frames if it has no more.

    Args:
        source: a path, or the encoded file's bytes.
        max_frames: most frames to return, at least 1.
        origin: ``file:line`` of the record, for messages.

    Raises:
        RecordError: ``missing_video`` if the path is no file; ``undecodable_video`` if no frame can be read.
        DataError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise DataError("videos need PyAV: pip install 'vlmpo[video]' (or take records with `video` out)") from error
    name = f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)
    if not isinstance(source, bytes) and not os.path.isfile(name):
        raise missing_file(name, origin, "video")
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else name) as container:
            times = sorted(packet.pts for packet in container.demux(video=0) if packet.pts is not None)
            if not times:
                raise ValueError("it has no frame")
            return _frames_at(container, _evenly(times, max_frames))
    except MemoryError:
        raise  # out of memory is not the record's fault
    except Exception as error:  # FFmpeg's errors are of many kinds
        cause = f"{type(error).__name__}: {error}".replace(repr(name), "it")
        detail = f"video {shorten_path(name)} cannot be used ({cause}); replace the file or take the record out"
        raise RecordError("undecodable_video", origin, detail) from error


def _evenly(times: Sequence[int], count: int) -> list[int]:
    """Return ``count`` of ``times``: the middle one of each of as many equal stretches."""
    if len(times) <= count:
        return list(times)
    return [times[(2 * index + 1) * len(times) // (2 * count)] for index in range(count)]


def _frames_at(container: Any, times: Sequence[int]) -> list[Image.Image]:
    """Return the frames at ``times``, ascending presentation times in the stream's units."""
    stream = container.streams.video[0]
    frames = []
    for time in times:
        container.seek(time, stream=stream, backward=True)  # to the key frame before it
        frame = next((f for f in container.decode(stream) if f.pts is not None and f.pts >= time), None)
        if frame is None:
            raise ValueError(f"its frame at {float(time * stream.time_base):.2f} s cannot be decoded")
        # Telephones record how to turn the picture instead of turning it.
        frames.append(frame.to_image().convert("RGB").rotate(frame.rotation, expand=True))
    return frames
