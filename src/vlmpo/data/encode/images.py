"""Any image file into one upright 8-bit RGB image; a failure names the file, the record and the cause."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

import numpy as np
from PIL import Image

from vlmpo.errors import RecordError

# A VLM is shown a few megapixels of an image at most. Up to this many, every conversion below was measured to stay
# under 1 GB; Pillow's own limit would let 2.7 times as many through.
MAX_PIXELS = 8192 * 8192

_WHITE = (255, 255, 255)
_BLOCK = 1 << 20
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: str | os.PathLike[str] | bytes | Image.Image, origin: str = "") -> Image.Image:
    """Reads one image as the model shall see it: mode RGB, 8 bits, upright, first frame, without metadata.

    EXIF orientation is applied (and removed: a processor that applies it again finds none), transparency is laid over
    white, 16-bit gray is scaled from its full range, every other mode converted. A PIL image is left as it was.

    Args:
        source: a path, the encoded file's bytes, or a PIL image.
        origin: ``file:line`` of the record, for messages.

    Raises:
        RecordError: ``missing_image`` when the path is no file; ``undecodable_image`` when it cannot be read, is
            damaged or cut off, or holds more than ``MAX_PIXELS`` pixels (told from its header, before decoding).
    """
    if isinstance(source, Image.Image):
        name = f"<{type(source).__name__} {source.width}x{source.height}>"
    elif isinstance(source, bytes):
        name = f"<{len(source)} bytes>"
    else:
        name = os.fspath(source)
        if not os.path.isfile(name):
            raise missing_image(name, origin)
    try:
        if isinstance(source, Image.Image):
            image, orientation = _decode(source)
        else:
            image, orientation = _decode_file(io.BytesIO(source) if isinstance(source, bytes) else name)
        # After _decode has let go of the original, so that no third copy is alive.
        return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
    except MemoryError:
        raise  # this machine's trouble, not the file's: a record must not be dropped for it
    except Exception as error:  # Pillow's plugins raise whatever a damaged file leads them into
        cause = f"{type(error).__name__}: {error}"
        detail = f"image {name} cannot be used ({cause}); replace the file or take the record out"
        raise RecordError("undecodable_image", origin, detail) from error


def size_in_header(source: str | os.PathLike[str] | bytes | Image.Image) -> tuple[int, int] | None:
    """Height and width as they are written in the file, which may lie on its side; nothing is decoded.

    None where :func:`open_image` would refuse the image by as much as that.
    """
    try:
        if isinstance(source, Image.Image):
            size = source.size
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                size = image.size
    except MemoryError:
        raise
    except Exception:  # Pillow's plugins raise whatever a damaged file leads them into
        return None
    return (size[1], size[0]) if size[0] * size[1] <= MAX_PIXELS else None


def missing_image(path: str, origin: str) -> RecordError:
    """The error for an image path that is no file."""
    kind = "is not a file" if os.path.exists(path) else "does not exist"
    return RecordError("missing_image", origin, f"image {path} {kind}; check the image root and the record's `image`")


def _decode_file(file: str | BinaryIO) -> tuple[Image.Image, int]:
    with Image.open(file) as image:
        return _decode(image)


def _decode(image: Image.Image) -> tuple[Image.Image, int]:
    """The picture in RGB, not yet upright, and its EXIF orientation (1 when it has none that can be read)."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} are read: shrink it")
    image.load()
    # Only now: Pillow turns TIFF files upright while loading and then takes the tag away.
    orientation = _orientation(image)
    rgb = _to_rgb(image)
    rgb.info = {}  # orientation left here would be applied a second time by whoever looks
    return rgb, orientation


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about orientation; the pixels are still good
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_gray_to_eight_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode != "RGBA":
        image = _with_eight_bit_key(image).convert("RGBA")
    canvas = Image.new("RGB", image.size, _WHITE)
    canvas.paste(image, mask=image)
    return canvas


def _with_eight_bit_key(image: Image.Image) -> Image.Image:
    """Pillow cuts 16-bit RGB to 8 bits but leaves the file's 16-bit transparent colour as it was."""
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image


def _deep_gray_to_eight_bits(image: Image.Image) -> Image.Image:
    """Modes I;16*, I and F -> L. The range a file means is kept where it can be told, else the picture's own is used.

    16-bit integers, also when held in mode I: 0..65535. Floats: 0..1 or 0..255. Anything else: its own minimum to its
    own maximum.
    """
    values = np.asarray(image)  # [height, width]
    finite = values[np.isfinite(values)] if image.mode == "F" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if image.mode != "F" and low >= 0 and high <= 65535:
        table = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        gray = table[values]
    else:
        if image.mode == "F" and low >= 0 and high <= 255:
            low, high = 0.0, 1.0 if high <= 1 else 255.0
        scale = 255.0 / ((high - low) or 1.0)
        gray = np.empty(values.shape, np.uint8)
        flat_values, flat_gray = values.reshape(-1), gray.reshape(-1)
        for start in range(0, flat_gray.size, _BLOCK):  # float64 of the whole picture would be eight times its size
            scaled = (flat_values[start : start + _BLOCK].astype(np.float64) - low) * scale
            flat_gray[start : start + _BLOCK] = np.clip(np.rint(np.nan_to_num(scaled, nan=0.0)), 0, 255)
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray[values == key] = 255  # the transparent gray value, over white
    return Image.fromarray(gray)
