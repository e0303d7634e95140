"""Files become pictures. The oracles: what was drawn, arithmetic, and VaeImageProcessor for sizes."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from batchsd import images
from batchsd.types import RowError

RED, GREEN, BLUE = (230, 30, 30), (30, 200, 40), (20, 40, 220)


def file(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    into = io.BytesIO()
    picture.save(into, format, **options)
    return into.getvalue()


def npy(values: object) -> bytes:
    into = io.BytesIO()
    np.save(into, np.asarray(values))
    return into.getvalue()


def bands() -> Image.Image:
    """16 wide, 24 high: red above, green in the middle, blue below."""
    return Image.fromarray(np.repeat(np.array([[RED], [GREEN], [BLUE]], np.uint8), 8, 0).repeat(16, 1))


def header_only_png(width: int, height: int) -> bytes:
    """A PNG that says that size and holds next to nothing: what a bomb looks like before it is decoded."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("format", "options", "slack"),
    [
        ("PNG", {}, 0), ("BMP", {}, 0), ("TIFF", {}, 0), ("WEBP", {"lossless": True}, 0), ("GIF", {}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 12),
    ],
)  # fmt: skip
def test_formats(format, options, slack):
    found = images.rgb(file(bands(), format, **options))
    assert found.mode == "RGB" and found.size == (16, 24)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(bands())).max() <= slack


def modes() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """File bytes, and the colour of its top left pixel."""
    wide = Image.fromarray(np.full((4, 4), 200 * 257, np.uint16))
    clear = Image.new("RGBA", (4, 4), (*RED, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *GREEN])
    moving = [Image.new("RGB", (4, 4), colour) for colour in (BLUE, RED)]
    return {
        "CMYK": (file(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        "16-bit grey": (file(wide), (200, 200, 200)),
        "8-bit grey": (file(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        "1 bit": (file(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        "palette": (file(palette), GREEN),
        "palette with a clear colour": (file(palette, transparency=1), (255, 255, 255)),
        "alpha": (file(clear), (255, 255, 255)),
        "grey with alpha": (file(Image.new("LA", (4, 4), (0, 255))), (0, 0, 0)),
        "animated GIF": (file(moving[0], "GIF", save_all=True, append_images=moving[1:]), BLUE),
        "animated WebP": (
            file(moving[0], "WEBP", save_all=True, append_images=moving[1:], lossless=True),
            BLUE,
        ),
    }


@pytest.mark.parametrize("mode", modes())
def test_modes(mode):
    content, colour = modes()[mode]
    found = images.rgb(content)
    assert found.mode == "RGB" and found.size == (4, 4)
    assert found.getpixel((0, 0)) == colour


def test_sixteen_bits_of_rgb():
    """Pillow writes none: a PNG by hand, of 16 bits a channel."""
    row = b"\0" + struct.pack(">3H", 200 * 257, 30 * 257, 0) * 2

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row * 2)) + chunk(b"IEND", b"")
    assert images.rgb(content).getpixel((1, 1)) == (200, 30, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    # the inverse of what EXIF asks for: a camera that was held so
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    held = bands().transpose(turns[orientation]) if orientation > 1 else bands()
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = images.rgb(file(held, exif=exif))
    assert np.array_equal(np.asarray(found), np.asarray(bands()))


BAD = {
    "zero bytes": (b"", "not an image file"),
    "text": (b"hello" * 9, "not an image file of PNG, JPEG"),
    "format that is not allowed": (file(bands(), "PPM"), "not an image file"),
    "truncated JPEG": (file(bands().resize((256, 256)), "JPEG")[:900], "cannot be decoded"),
    "truncated PNG": (file(bands())[:60], "cannot be decoded"),
    "30000 x 30000": (header_only_png(30000, 30000), "pixels"),
    "one pixel too many": (header_only_png(8192, 8193), "8192 x 8193 pixels, at most 67,108,864"),
    "float": (file(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "no agreed white"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("read", [images.rgb, images.grey, images.field])
def test_bad_files(what, read):
    if what == "float" and read is images.field:
        return
    content, message = BAD[what]
    with pytest.raises(RowError, match=message) as error:
        read(content)
    assert error.value.status == "bad_image" and "\n" not in str(error.value)


# -- maps


def maps() -> dict[str, tuple[bytes, list]]:
    values, real = [[0, 1], [200, 255]], [[0.5, -2.0], [1e6, 3.0]]
    wide = np.array([[0, 1], [40000, 65535]], np.uint16)
    return {
        "8-bit PNG": (file(Image.fromarray(np.array(values, np.uint8))), values),
        "16-bit PNG": (file(Image.fromarray(wide)), wide.tolist()),
        "grey in RGB": (file(Image.fromarray(np.array(values, np.uint8)).convert("RGB")), values),
        "float TIFF": (file(Image.fromarray(np.array(real, np.float32)), "TIFF"), real),
        "npy": (npy(real), real),
        "npy of one channel": (npy(np.array([[[1, 2], [3, 4]]], np.int16)), [[1, 2], [3, 4]]),
        "npy half": (npy(np.array([[1, 2], [3, 4]], np.float16)), [[1, 2], [3, 4]]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", maps())
def test_maps(kind):
    content, values = maps()[kind]
    found = images.field(content)
    assert found.dtype == np.float32 and found.tolist() == values


HUGE_NPY = (
    lambda head: b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head
)(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }\n")  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy([[1.0, np.nan], [np.inf, 2]]), "2 of its 4 numbers are NaN or infinite"),
        (npy(np.zeros((2, 2, 3))), r"shape \(2, 2, 3\)"),
        (npy([["a", "b"]]), "plain numbers"),
        (npy(np.array([[None]])), "plain numbers"),
        (npy([[1.0] * 9])[:-8], "cannot be decoded"),
        (HUGE_NPY, "1000000 x 1000000 pixels"),
    ],
)
def test_bad_maps(content, message):
    with pytest.raises(RowError, match=message):
        images.field(content)


# -- sizes


@pytest.mark.parametrize("size", [(16, 24), (32, 16), (8, 40), (24, 36), (64, 8)])
@pytest.mark.parametrize(("resize", "theirs"), [("stretch", "default"), ("crop", "crop"), ("pad", "fill")])
def test_fitted_equals_diffusers(size, resize, theirs):
    from diffusers.image_processor import VaeImageProcessor

    soft = bands().resize((21, 37), Image.Resampling.BICUBIC)
    found = images.fitted(soft, size, resize)
    expected = VaeImageProcessor().resize(soft, size[1], size[0], resize_mode=theirs)
    assert found.size == size
    # its `fill` resamples the edge row that it repeats: not the same numbers to the last bit
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= (1 if resize == "pad" else 0)


def test_a_long_line_is_refused_before_it_is_scaled():
    with pytest.raises(RowError, match="pixels, at most"):
        images.fitted(Image.new("RGB", (2_000_000, 1)), (64, 64), "crop")


def test_maps_are_cut_as_pictures_are():
    y, x = np.mgrid[:48, :80].astype(np.float32)
    assert images.at_aspect(x, (32, 32), "crop")[0].tolist() == list(range(16, 64))
    assert images.at_aspect(y, (40, 12), "crop")[:, 0].tolist() == list(range(12, 36))
    padded = images.at_aspect(x, (32, 32), "pad")
    assert padded.shape == (80, 80) and np.array_equal(padded[0], x[0])
    assert images.at_aspect(x, (32, 32), "stretch") is x
    assert images.at_aspect(x, (40, 24), "crop") is x


def test_tensor_is_what_diffusers_makes():
    from diffusers.image_processor import VaeImageProcessor

    picture = bands().resize((24, 40), Image.Resampling.BICUBIC)
    assert torch.equal(images.to_tensor(picture), VaeImageProcessor().preprocess(picture)[0])
