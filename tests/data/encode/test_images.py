"""open_image against pixel values worked out by hand, and against a folder of odd files."""

import io
import json
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.paths import SHARED
from vlmpo.data.encode import images
from vlmpo.data.encode.images import open_image
from vlmpo.errors import RecordError

ODD_IMAGES = SHARED / "data" / "odd_images"
needs_odd_images = pytest.mark.skipif(not ODD_IMAGES.is_dir(), reason="../shared/data/odd_images is not there")

WHITE, BLACK, RED, GREEN = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0)


def png(size: tuple[int, int], depth: int, color: int, rows: list[bytes], key: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG put together by hand, so that no encoder's habits come between a pixel value and the test."""
    header = struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), (b"eXIf", more), (b"tRNS", key), (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
        if data or kind == b"IEND"
    )


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list[list[tuple[int, ...]]]:
    """Rows of (r, g, b)."""
    assert image.mode == "RGB"
    return [[tuple(int(v) for v in pixel) for pixel in row] for row in np.asarray(image)]


def row_of(mode: str, *values: object) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)  # type: ignore[arg-type]
    return image


# --- transparency: over white


def test_alpha_is_laid_over_white() -> None:
    # 8-bit RGBA. Alpha 51 is 0.2: red gives (255, 0.8 * 255, 0.8 * 255) = (255, 204, 204), black 0.8 * 255 = 204.
    data = png(
        (4, 1), 8, 6, [bytes([9, 9, 9, 0]) + bytes([1, 2, 3, 255]) + bytes([255, 0, 0, 51]) + bytes([0, 0, 0, 51])]
    )
    assert pixels(open_image(data)) == [[WHITE, (1, 2, 3), (255, 204, 204), (204, 204, 204)]]


def test_gray_with_alpha() -> None:
    data = png((3, 1), 8, 4, [bytes([0, 0, 0, 255, 0, 51])])
    assert pixels(open_image(data)) == [[WHITE, BLACK, (204, 204, 204)]]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(png((3, 1), 8, 0, [bytes([7, 8, 9])], struct.pack(">H", 8)), [7, 255, 9], id="L"),
        pytest.param(
            png((3, 1), 1, 0, [bytes([0b01000000])], struct.pack(">H", 0)), [255, 255, 255], id="1, black key"
        ),
        pytest.param(png((3, 1), 1, 0, [bytes([0b01000000])], struct.pack(">H", 1)), [0, 255, 0], id="1, white key"),
        pytest.param(
            png((3, 1), 16, 0, [struct.pack(">3H", 0, 514, 65535)], struct.pack(">H", 514)), [0, 255, 255], id="I;16"
        ),
    ],
)
def test_transparent_gray_value(data: bytes, expected: list[int]) -> None:
    assert pixels(open_image(data)) == [[(v, v, v) for v in expected]]


def test_transparent_colour() -> None:
    data = png((3, 1), 8, 2, [bytes([1, 2, 3, 4, 5, 6, 1, 2, 4])], struct.pack(">3H", 4, 5, 6))
    assert pixels(open_image(data)) == [[(1, 2, 3), WHITE, (1, 2, 4)]]


def test_transparent_colour_of_16_bits() -> None:
    key = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    data = png((2, 1), 16, 2, [struct.pack(">3H", 0xFFFF, 0, 0x8000) + key], key)
    assert pixels(open_image(data)) == [[(255, 0, 128), WHITE]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_palette_with_transparency(transparency: int | bytes) -> None:
    image = row_of("P", 0, 1, 2)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    data = encoded(image, "PNG", transparency=transparency)
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert pixels(open_image(data)) == [[RED, WHITE, (0, 0, 255)]]


def test_palette_half_transparent() -> None:
    image = row_of("P", 0, 1)
    image.putpalette([0, 0, 0, 0, 0, 0])
    assert pixels(open_image(encoded(image, "PNG", transparency=bytes([51, 255])))) == [[(204, 204, 204), BLACK]]


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "LA", "RGBA"])
def test_fully_transparent_is_white_in_every_mode_with_alpha(mode: str) -> None:
    assert pixels(open_image(Image.new(mode, (1, 1)))) == [[WHITE]]


# --- more than 8 bits


def test_16_bit_gray_is_scaled_from_its_full_range() -> None:
    # v * 255 / 65535 = v / 257: 128 -> 0.498 -> 0, 129 -> 0.502 -> 1, 32768 -> 127.502 -> 128, 257 * 200 -> 200.
    values = [0, 128, 129, 257, 32767, 32768, 51400, 65535]
    data = png((8, 1), 16, 0, [struct.pack(">8H", *values)])
    expected = [0, 0, 1, 1, 127, 128, 200, 255]
    assert pixels(open_image(data)) == [[(v, v, v) for v in expected]]


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_every_16_bit_mode_means_the_same(mode: str) -> None:
    assert pixels(open_image(row_of(mode, 0, 32768, 65535))) == [[BLACK, (128, 128, 128), WHITE]]


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        pytest.param("I", [-100, -20, 100], [0, 102, 255], id="negative: own range"),
        pytest.param("I", [0, 102800, 262140], [0, 100, 255], id="32 bits: own range"),
        pytest.param("F", [0.0, 0.2, 1.0], [0, 51, 255], id="0..1"),
        pytest.param("F", [0.0, 10.4, 255.0], [0, 10, 255], id="0..255"),
        pytest.param("F", [-1.0, -0.5, 1.0], [0, 64, 255], id="own range"),
        pytest.param("F", [float("nan"), 0.4, float("inf")], [0, 102, 255], id="no numbers"),
        pytest.param("F", [300.0, 300.0], [0, 0], id="flat, out of range"),
    ],
)
def test_integers_of_32_bits_and_floats(mode: str, values: list[float], expected: list[int]) -> None:
    assert pixels(open_image(row_of(mode, *values))) == [[(v, v, v) for v in expected]]


def test_16_bit_tiff_turned_by_its_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(row_of("I;16", 0, 65535), "TIFF", exif=exif)
    assert pixels(open_image(data)) == [[BLACK], [WHITE]]  # 6: the stored left edge is the top


# --- other modes


@pytest.mark.parametrize(
    ("mode", "value", "expected", "tolerance"),
    [
        ("1", 1, WHITE, 0),
        ("L", 77, (77, 77, 77), 0),
        ("CMYK", (0, 0, 0, 0), WHITE, 0),
        ("CMYK", (0, 255, 255, 0), RED, 0),
        ("CMYK", (0, 0, 0, 255), BLACK, 0),
        ("YCbCr", (76, 85, 255), RED, 2),  # Y = 0.299 * 255, Cb = 128 - 0.168736 * 255, Cr = 128 + 0.5 * 255
        ("HSV", (85, 255, 255), GREEN, 0),  # 85 / 255 of the circle: 120 degrees
        ("LAB", (255, 128, 128), WHITE, 1),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3), 0),
    ],
)
def test_other_modes(mode: str, value: object, expected: tuple[int, ...], tolerance: int) -> None:
    ((pixel,),) = pixels(open_image(row_of(mode, value)))
    assert np.abs(np.subtract(pixel, expected)).max() <= tolerance


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (3, 2), color) for color in (RED, GREEN, (0, 0, 255))]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
        assert pixels(open_image(data)) == [[RED] * 3] * 2


# --- orientation

# What EXIF says of the stored picture  a b c / d e f : where its row 0 and column 0 lie in the upright one.
STORED = "abc/def"
UPRIGHT = {
    1: "abc/def",  # row 0 top, column 0 left
    2: "cba/fed",  # top, right
    3: "fed/cba",  # bottom, right
    4: "def/abc",  # bottom, left
    5: "ad/be/cf",  # row 0 left, column 0 top
    6: "da/eb/fc",  # right, top
    7: "fc/eb/da",  # right, bottom
    8: "cf/be/ad",  # left, bottom
}


def lettered(text: str) -> list[list[int]]:
    return [[40 * (ord(letter) - ord("a")) for letter in row] for row in text.split("/")]


@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "PIL"])
def test_orientation_is_applied_once(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.array(lettered(STORED), np.uint8)).convert("RGB")
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(stored, "PNG" if kind == "PIL" else kind, exif=exif, **options)
    image = open_image(Image.open(io.BytesIO(data)) if kind == "PIL" else data)
    assert np.asarray(image)[..., 0].tolist() == lettered(UPRIGHT.get(orientation, STORED))
    assert 0x0112 not in image.getexif()  # or a processor that looks for it would turn the image again


def test_damaged_exif_leaves_the_picture_as_stored() -> None:
    rows = [bytes([1, 2, 3, 4, 5, 6])]
    for exif in (b"II*\0\xff\xff\xff\xff", b"nonsense", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"):
        assert pixels(open_image(png((2, 1), 8, 2, rows, more=exif))) == [[(1, 2, 3), (4, 5, 6)]]


# --- sources and refusals


def test_paths_bytes_and_pil_images_give_the_same(tmp_path: Path) -> None:
    data = png((2, 1), 8, 2, [bytes([1, 2, 3, 4, 5, 6])])
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (str(path), path, data, Image.open(path)):
        assert pixels(open_image(source)) == [[(1, 2, 3), (4, 5, 6)]]


def test_a_pil_image_is_left_as_it_was() -> None:
    given = Image.new("RGB", (2, 1), RED)
    given.info["kept"] = 1
    opened = open_image(given)
    opened.putpixel((0, 0), GREEN)
    assert pixels(given) == [[RED, RED]]
    assert given.info == {"kept": 1}


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecordError) as caught:
        open_image(str(tmp_path / "no.png"), "pairs.jsonl:3")
    assert (caught.value.reason, caught.value.origin) == ("missing_image", "pairs.jsonl:3")
    assert f"image {tmp_path}/no.png does not exist" in str(caught.value)
    with pytest.raises(RecordError, match="is not a file") as caught:
        open_image(tmp_path)
    assert caught.value.reason == "missing_image"


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        pytest.param(b"", "UnidentifiedImageError", id="empty"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "UnidentifiedImageError", id="LFS pointer"),
        pytest.param(encoded(Image.effect_noise((64, 64), 50), "PNG")[:1500], "truncated", id="PNG cut off"),
        pytest.param(encoded(Image.effect_noise((64, 64), 50), "JPEG")[:1500], "truncated", id="JPEG cut off"),
    ],
)
def test_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "broken.img"
    path.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        open_image(path, "pairs.jsonl:8")
    assert caught.value.reason == "undecodable_image"
    assert str(caught.value).startswith(f"pairs.jsonl:8: image {path} cannot be used (")
    assert cause in str(caught.value)


def test_too_many_pixels_are_refused_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    # No pixel data at all: were it decoded, the message would be another.
    wide = png((images.MAX_PIXELS // 64 + 1, 64), 1, 0, [])
    with pytest.raises(RecordError, match=r"1048577x64 pixels, at most 67108864 are read") as caught:
        open_image(wide)
    assert caught.value.reason == "undecodable_image"
    monkeypatch.setattr(images, "MAX_PIXELS", 6)
    assert open_image(Image.new("RGB", (3, 2))).size == (3, 2)
    with pytest.raises(RecordError, match="7x1 pixels, at most 6"):
        open_image(Image.new("RGB", (7, 1)))


def test_pillows_own_bomb_check_is_a_record_error_too() -> None:
    with pytest.raises(RecordError, match="DecompressionBombError"):
        open_image(png((1 << 20, 1 << 20), 1, 0, []))


def test_lack_of_memory_is_not_blamed_on_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(_: Image.Image) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(images, "_to_rgb", no_memory)
    with pytest.raises(MemoryError):
        open_image(png((1, 1), 8, 0, [b"\0"]))


# --- the folder of odd files

ODD_INDEX = (
    [json.loads(line) for line in (ODD_IMAGES / "index.jsonl").read_text().splitlines()] if ODD_IMAGES.is_dir() else []
)


@needs_odd_images
def test_the_odd_files_are_all_there() -> None:
    assert len(ODD_INDEX) == 45
    assert sum("error" in entry for entry in ODD_INDEX) == 3


@pytest.mark.parametrize("entry", ODD_INDEX, ids=lambda entry: entry["image"])
def test_odd_file(entry: dict) -> None:
    path = ODD_IMAGES / entry["image"]
    if "error" in entry:
        with pytest.raises(RecordError) as caught:
            open_image(path)
        assert caught.value.reason == "undecodable_image"
        assert str(path) in str(caught.value)
        assert entry["error"] in str(caught.value)
        return
    image = open_image(path)
    width, height = entry["size"]
    is_turned = entry["exif_orientation"] in (5, 6, 7, 8)
    assert (image.mode, image.size) == ("RGB", (height, width) if is_turned else (width, height))


@needs_odd_images
@pytest.mark.parametrize("shape", ["Landscape", "Portrait"])
def test_exif_examples_all_show_the_same_picture(shape: str) -> None:
    def small(number: int) -> np.ndarray:
        return np.asarray(open_image(ODD_IMAGES / f"exif/{shape}_{number}.jpg").resize((60, 60)), np.float64)

    # Each file has its own number written on it and its own JPEG noise, so equal only for the most part.
    reference = small(1)
    for number in range(2, 9):
        assert np.abs(small(number) - reference).mean() < 5, number
    assert np.abs(reference[::-1] - reference).mean() > 20  # the measure tells orientations apart
    assert np.abs(reference[:, ::-1] - reference).mean() > 20


@pytest.mark.slow
@needs_odd_images
def test_odd_files_take_little_time_and_memory() -> None:
    script = """
        import json, resource, sys, time
        from vlmpo.data.encode.images import open_image
        from vlmpo.errors import RecordError
        slowest = 0.0
        for path in sys.argv[1:]:
            start = time.perf_counter()
            try:
                open_image(path)
            except RecordError:
                pass
            slowest = max(slowest, time.perf_counter() - start)
        # Linux: getrusage would count the parent's peak too, from before exec.
        try:
            peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([slowest, peak / 1024]))
    """
    files = [str(ODD_IMAGES / entry["image"]) for entry in ODD_INDEX]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), *files], capture_output=True, check=True)
    slowest, peak_mib = json.loads(done.stdout)
    assert slowest < 2.0
    assert 10 < peak_mib < 1000  # one process for all: its peak is above that of any single file
