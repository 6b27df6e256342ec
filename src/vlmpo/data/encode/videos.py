"""A video as frames: what a model that reads images can be shown of it, whatever its family.

Frames are taken evenly, at the middles of equal stretches of the video, and stand in the prompt as InternVL writes
them: ``Frame1: <image>``, a line each. So a video needs nothing of a family that several images do not need.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlmpo.data.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, PreferencePair
from vlmpo.errors import DataError, RecordError

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_FRAMES = 8


def with_frames(pair: PreferencePair, max_frames: int = DEFAULT_FRAMES) -> PreferencePair:
    """``pair`` with every video as at most ``max_frames`` images, each where its ``<video>`` stood; no videos left.

    Raises:
        RecordError: ``placeholder_mismatch``, ``missing_video`` or ``undecodable_video``.
        DataError: the library that reads videos is not installed.
    """
    written = sum(message.text.count(VIDEO_PLACEHOLDER) for message in pair.prompt) if pair.videos else 0
    if written != len(pair.videos):
        detail = (
            f"the prompt has {written} {VIDEO_PLACEHOLDER} for {len(pair.videos)} videos; write one where each stands"
        )
        raise RecordError("placeholder_mismatch", pair.origin, detail)
    if not pair.videos:
        return pair
    videos, images = iter(pair.videos), iter(pair.images)
    shown: list[Any] = []
    prompt = []
    for message in pair.prompt:
        first, *rest = message.text.split(VIDEO_PLACEHOLDER)
        shown += _taken(images, first, pair.origin)
        text = first
        for part in rest:
            frames = read_frames(next(videos), max_frames, pair.origin)
            shown += [*frames, *_taken(images, part, pair.origin)]
            lines = [f"Frame{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, len(frames) + 1)]
            text += "".join(lines) + part.removeprefix("\n")
        prompt.append(replace(message, text=text))
    # Images that no placeholder claims are kept: the count is then refused where images are counted.
    return replace(pair, prompt=tuple(prompt), images=(*shown, *images), videos=())


def _taken(images: Iterator[Any], text: str, origin: str) -> list[Any]:
    """The next images, one for each placeholder in ``text``."""
    taken = []
    for _ in range(text.count(IMAGE_PLACEHOLDER)):
        image = next(images, None)
        if image is None:
            detail = f"the prompt has more {IMAGE_PLACEHOLDER} than images; write one where each stands"
            raise RecordError("placeholder_mismatch", origin, detail)
        taken.append(image)
    return taken


def read_frames(source: str | os.PathLike[str] | bytes, max_frames: int, origin: str = "") -> list[Image.Image]:
    """At most ``max_frames`` upright RGB frames of a video, in order; all of them where it has no more.

    Args:
        source: a path, or the encoded file's bytes.
        max_frames: frames wanted, at least 1.
        origin: ``file:line`` of the record, for messages.

    Raises:
        RecordError: ``missing_video`` when the path is no file; ``undecodable_video`` when no frame can be read.
        DataError: PyAV is not installed.
    """
    av = _library()
    name = f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)
    if not isinstance(source, bytes) and not os.path.isfile(name):
        kind = "is not a file" if os.path.exists(name) else "does not exist"
        raise RecordError("missing_video", origin, f"video {name} {kind}; check the root and the record's `video`")
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else name) as container:
            times = sorted(packet.pts for packet in container.demux(video=0) if packet.pts is not None)
            if not times:
                raise ValueError("it has no frame")
            return _frames_at(container, _evenly(times, max_frames))
    except MemoryError:
        raise  # this machine's trouble, not the file's
    except Exception as error:  # FFmpeg's errors are of many kinds
        cause = f"{type(error).__name__}: {error}"
        detail = f"video {name} cannot be used ({cause}); replace the file or take the record out"
        raise RecordError("undecodable_video", origin, detail) from error


def _evenly(times: Sequence[int], count: int) -> list[int]:
    """``count`` of ``times``: the middle one of each of as many equal stretches."""
    if len(times) <= count:
        return list(times)
    return [times[(2 * index + 1) * len(times) // (2 * count)] for index in range(count)]


def _frames_at(container: Any, wanted: Sequence[int]) -> list[Image.Image]:
    """The frames shown at ``wanted``, ascending presentation times in the stream's units."""
    stream = container.streams.video[0]
    found = []
    for time in wanted:
        container.seek(time, stream=stream, backward=True)  # to the key frame before it
        frame = next((f for f in container.decode(stream) if f.pts is not None and f.pts >= time), None)
        if frame is None:
            raise ValueError(f"its frame at {float(time * stream.time_base):.2f} s cannot be decoded")
        # Telephones write how to turn the picture instead of turning it.
        found.append(frame.to_image().convert("RGB").rotate(frame.rotation, expand=True))
    return found


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError("videos need PyAV: pip install 'vlmpo[video]' (or take records with `video` out)") from error
    return av
