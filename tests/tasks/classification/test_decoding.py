import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from replknet.tasks.classification.decoding import CorruptImageError, decode_image

GRADIENT = np.linspace(0, 255, 48, dtype=np.uint8).reshape(6, 8)


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("wanted", ["RGB", "L"])
def test_every_mode_becomes_the_wanted_one(mode, wanted):
    grey = Image.fromarray(GRADIENT)
    if mode == "LAB":
        neutral = Image.new("L", grey.size, 128)
        image = Image.merge("LAB", [grey, neutral, neutral])
    else:
        image = (grey if mode == "P" else grey.convert("RGB")).convert(mode)
    storage = "TIFF" if mode in ("CMYK", "YCbCr", "LAB") else "PNG"
    decoded = decode_image(encoded(image, storage), wanted)
    assert decoded.mode == wanted
    assert decoded.size == (8, 6)
    pixels = np.asarray(decoded.convert("L"), dtype=int)
    if mode == "1":
        assert set(np.unique(pixels)) == {0, 255}
    else:
        # CIE lightness is no multiple of sRGB's grey, but not far from it.
        assert np.abs(pixels - GRADIENT).max() <= (30 if mode == "LAB" else 2)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_images_keep_their_upper_bits(dtype):
    wide = (GRADIENT.astype(dtype) << 8) + 200
    decoded = decode_image(encoded(Image.fromarray(wide), "TIFF"), "L")
    assert np.array_equal(np.asarray(decoded), GRADIENT)


@pytest.mark.parametrize("scale", [1.0, 1 / 255])
def test_float_images_are_in_bytes_or_in_the_unit_interval(scale):
    image = Image.fromarray((GRADIENT * scale).astype(np.float32))
    decoded = np.asarray(decode_image(encoded(image, "TIFF"), "L"), dtype=int)
    assert np.abs(decoded - GRADIENT).max() <= 1


def test_transparency_is_shown_on_white():
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 255))
    image.putpixel((0, 0), (10, 20, 30, 0))
    assert decode_image(encoded(image)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(image)).getpixel((1, 1)) == (10, 20, 30)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putpixel((2, 2), 0)
    decoded = decode_image(encoded(palette, transparency=b"\0\xff"))
    assert decoded.getpixel((2, 2)) == (255, 255, 255)
    assert decoded.getpixel((0, 0)) == (9, 8, 7)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (30, 10), "white")
    image.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the file's left is the upper side
    decoded = decode_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert decoded.size == (10, 30)
    red, green, _ = decoded.getpixel((5, 3))
    assert red > 200
    assert green < 60


def broken_files() -> dict[str, bytes]:
    """Bytes that make Pillow raise, among others: errors of different kinds."""
    jpeg = encoded(Image.fromarray(GRADIENT).resize((200, 200)), "JPEG")
    png = encoded(Image.fromarray(GRADIENT))
    bomb = bytearray(png)
    bomb[16:24] = struct.pack(">II", 100_000, 100_000)
    dds = b"DDS " + struct.pack("<7I", 124, 0x1007, 4, 4, 16, 0, 0) + bytes(44)
    dds += struct.pack("<8I", 32, 8, 0, 8, 0, 0, 0, 0) + bytes(20)
    return {
        "empty": b"",
        "text": b"not an image",
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "truncated png": png[: len(png) // 2],
        "bomb": bytes(bomb),
        "unknown dds": dds,
        "bad chunk": png.replace(b"IDAT", b"I\0AT"),
    }


@pytest.mark.parametrize("kind", broken_files())
def test_whatever_the_decoder_raises_becomes_one_error(kind):
    with pytest.raises(CorruptImageError, match="photo 7: ") as caught:
        decode_image(broken_files()[kind], source="photo 7")
    assert caught.value.source == "photo 7"
    assert type(caught.value.__cause__).__name__ in caught.value.reason


def test_broken_files_raise_more_than_os_errors():
    causes = set()
    for data in broken_files().values():
        try:
            decode_image(data)
        except CorruptImageError as error:
            causes.add(type(error.__cause__))
    assert any(not issubclass(cause, OSError) for cause in causes)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CorruptImageError, match=r"none\.jpg: FileNotFoundError"):
        decode_image(tmp_path / "none.jpg")


def test_a_folder_of_hostile_images_loads_or_is_reported(tmp_path):
    """Set REPLKNET_HOSTILE_IMAGES to a folder, such as Tests/images of Pillow's sources."""
    root = Path(os.environ.get("REPLKNET_HOSTILE_IMAGES", tmp_path))
    if root == tmp_path:
        for name, data in broken_files().items():
            (root / name).write_bytes(data)
        (root / "good.png").write_bytes(encoded(Image.fromarray(GRADIENT)))
    loaded = reported = 0
    paths = [path for path in root.rglob("*") if path.is_file()]
    for path in paths:
        try:
            image = decode_image(path)
        except CorruptImageError:
            reported += 1
        else:
            loaded += image.mode == "RGB" and min(image.size) > 0
    assert loaded > 0
    assert reported > 0
    assert loaded + reported == len(paths)
