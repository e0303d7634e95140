"""Encoded pictures, read back by Pillow's decoders."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from batchsd.encode import encoder
from batchsd.types import UsageError


@pytest.fixture
def image_HWC():
    """A smooth 48 x 64 picture: lossy formats keep it within a few steps of 255."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([x * 4, y * 5, (x + y) * 2], axis=-1).astype(np.uint8)


def test_png_is_exact_and_level_1(image_HWC):
    data, extension = encoder({})(image_HWC)
    assert extension == "png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image_HWC)
    idat = data[data.index(b"IDAT") + 4 :]
    assert idat[1] >> 6 == 0  # RFC 1950: FLEVEL 0 is the fastest, what zlib writes for level 1
    assert zlib.decompressobj().decompress(idat)[:1] in (b"\0", b"\1", b"\2", b"\3", b"\4")


@pytest.mark.parametrize(
    "options, extension, name", [({"format": "JPG"}, "jpg", "JPEG"), ({"format": "webp"}, "webp", "WEBP")]
)
def test_lossy_formats_are_near(image_HWC, options, extension, name):
    data, got = encoder(options)(image_HWC)
    back = Image.open(io.BytesIO(data))
    assert (got, back.format, back.size) == (extension, name, (64, 48))
    error = np.abs(np.asarray(back).astype(int) - image_HWC.astype(int))
    assert error.mean() < 3


def test_options_reach_the_file(image_HWC):
    noisy = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    low, high = (encoder({"format": "jpeg", "quality": q})(noisy)[0] for q in (10, 95))
    assert len(low) < len(high) / 2
    fast, small = (encoder({"compress_level": level})(image_HWC)[0] for level in (0, 9))
    assert len(small) < len(fast) / 2


def test_same_picture_same_bytes(image_HWC):
    for name in ("png", "jpeg", "webp"):
        assert encoder({"format": name})(image_HWC) == encoder({"format": name})(image_HWC.copy())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"format": "bmp"}, "output.image.format: 'bmp' is unknown; have png, jpeg, webp"),
        ({"format": "jpeg", "qualty": 90}, "'qualty' - did you mean 'quality'"),
        ({"format": "png", "quality": 90}, "unknown setting 'quality'; png has compress_level"),
        ({"compress_level": 10}, "10 is not a whole number from 0 to 9"),
        ({"format": "webp", "quality": True}, "True is not a whole number"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(UsageError) as error:
        encoder(options)
    assert words in str(error.value)
