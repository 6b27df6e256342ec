"""Opens any image file as one upright 8-bit RGB image; errors name the file, the record and the cause."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from vlmpo.errors import RecordError, shorten_path

# VLMs read a few megapixels of an image at most. Up to this many pixels, every conversion below was measured to take
# less than 1 GB; Pillow's own limit is 2.7 times as high.
MAX_PIXELS = 8192 * 8192

_BLOCK = 1 << 20
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
    """Return an image as the model sees it: mode RGB, 8 bits, upright, first frame, without metadata.

    EXIF orientation is applied and removed, so that no processor applies it again. Transparent pixels are laid over
    white, 16-bit gray is scaled from its full range, every other mode is converted. A PIL image is not changed.

    Args:
        source: a path, the encoded file's bytes, or a PIL image.
        origin: ``file:line`` of the record, for messages.

    Raises:
        RecordError: ``missing_image`` if the path is no file; ``undecodable_image`` if the image cannot be read, is
            damaged or cut off, or has more than ``MAX_PIXELS`` pixels by its header (it is then not decoded).
    """
    if isinstance(source, Image.Image):
        name = f"<{type(source).__name__} {source.width}x{source.height}>"
    elif isinstance(source, bytes):
        name = f"<{len(source)} bytes>"
    else:
        name = os.fspath(source)
        if not os.path.isfile(name):
            raise missing_file(name, origin)
    try:
        if isinstance(source, Image.Image):
            image, orientation = _decode(source)
        else:
            image, orientation = _decode_file(io.BytesIO(source) if isinstance(source, bytes) else name)
        # After _decode has freed the original, so that there is never a third copy.
        return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
    except MemoryError:
        raise  # out of memory is not the record's fault
    except Exception as error:  # on damaged files Pillow's plugins raise errors of all kinds
        cause = f"{type(error).__name__}: {error}".replace(repr(name), "it")
        detail = f"image {shorten_path(name)} cannot be used ({cause}); replace the file or take the record out"
        raise RecordError("undecodable_image", origin, detail) from error


def size_in_header(source: str | os.PathLike[str] | bytes | Image.Image) -> tuple[int, int] | None:
    """Return the height and width in the file's header, before any EXIF rotation; nothing is decoded.

    None if the header is enough for :func:`open_image` to refuse the image.
    """
    try:
        if isinstance(source, Image.Image):
            size = source.size
        elif not isinstance(source, bytes) and not os.path.isfile(source):  # a pipe would never end
            return None
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                size = image.size
    except MemoryError:
        raise
    except Exception:  # as in open_image
        return None
    return (size[1], size[0]) if size[0] * size[1] <= MAX_PIXELS else None


def missing_file(path: str, origin: str, kind: str = "image") -> RecordError:
    """Return the error for the path of an image or video that is no file."""
    what = "is not a file" if os.path.exists(path) else "does not exist"
    detail = f"{kind} {shorten_path(path)} {what}; check the image root and the record's `{kind}`"
    return RecordError(f"missing_{kind}", origin, detail)


def _decode_file(file: str | BinaryIO) -> tuple[Image.Image, int]:
    with Image.open(file) as image:
        return _decode(image)


def _decode(image: Image.Image) -> tuple[Image.Image, int]:
    """Return the picture in RGB, not yet upright, and its EXIF orientation (1 if it has none that can be read)."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} are read: shrink it")
    if image.format == "EPS":
        raise ValueError("an EPS file is a program, which is not run: save it as PNG")
    image.load()
    # Only now: Pillow turns TIFF files upright while loading and then removes the tag.
    orientation = orientation_of(image)
    rgb = _to_rgb(image)
    rgb.info = {}  # an orientation left here would be applied a second time
    return rgb, orientation


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image that is decoded; 1 if it has none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data; the pixels are still good
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
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image)
    return canvas


def _with_eight_bit_key(image: Image.Image) -> Image.Image:
    """Cut the transparent colour of a 16-bit RGB file to 8 bits, as Pillow does with the pixels only."""
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image


def _deep_gray_to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert modes I;16*, I and F to L.

    The range of 16-bit integers, in mode I too, is 0..65535; that of floats is 0..1 or 0..255. Anything else is scaled
    from its own minimum to its own maximum.
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
