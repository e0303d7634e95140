"""The bytes of an image file become an upright picture of bounded size, in RGB, grey or metres.

    header checked -> decoded (first frame) -> EXIF orientation -> 8-bit RGB or grey | a float map -> fitted

Anything that goes wrong is the row's `bad_image`. Transparent pixels lie on white, as on a page.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from batchsd.types import RowError

Picture = Image.Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# 8192 x 8192. Checked from the header, before a pixel is decoded; Pillow's own alarm rings later, at 89 million.
MAX_PIXELS = 2**26
RESIZES = ("crop", "pad", "stretch")

_NPY = b"\x93NUMPY"
_ORIENTATION = 0x0112  # of EXIF
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # whole numbers beyond 8 bits


Decode = Callable[[bytes], Any]


class File(bytes):
    """The bytes of an image file, with what a thread that reads ahead has decoded of it: once for each use to come."""

    decoded: Mapping[Decode, list[Any]]

    @property
    def held(self) -> int:
        """Bytes, those of what is decoded included."""
        pictures = [pictures[0] for pictures in self.decoded.values() if pictures]
        return len(self) + sum(np.asarray(picture).nbytes for picture in pictures)


def rgb(content: bytes) -> Image.Image:
    """The picture as 8-bit RGB. CMYK, palettes, 16 bits, grey and alpha are converted. Raises RowError."""
    return _taken(content, _rgb)


def grey(content: bytes) -> Image.Image:
    """The picture as 8-bit grey (mode L), alpha ignored: a mask. Raises RowError."""
    return _taken(content, _grey)


def field(content: bytes) -> np.ndarray:
    """A map of numbers (a depth map) as float32 H W: a grey picture of 1 to 32 bits, or a .npy file.

    Colours count by their luminance. Raises RowError, also where a number is not finite.
    """
    return _taken(content, _field)


def decoded_ahead(column: str, content: bytes, uses: int) -> File:
    """The file, decoded as tasks want that column, for so many uses. One that cannot be fails where it is used."""
    file = File(content)
    file.decoded = {}
    decode = _BY_COLUMN.get(column)
    if decode is not None:
        with suppress(RowError):
            file.decoded = {decode: [decode(content)] * uses}
    return file


def looked_at(column: str, content: bytes, uses: int) -> File:
    """The file as if it were decoded: blank, of the size that its header says. Raises RowError for what is no image."""
    file = File(content)
    file.decoded = {}
    if decode := _BY_COLUMN.get(column):
        with _decoding():
            if column == "depth" and content.startswith(_NPY):
                height, width = _npy_shape(io.BytesIO(content))
            else:
                picture = _opened(content)
                width, height = picture.size
                # Of a PNG Pillow would decode all to look for EXIF behind the pixels.
                tagged = picture.format != "PNG" or "exif" in picture.info
                if tagged and picture.getexif().get(_ORIENTATION, 1) > 4:  # lies on its side
                    width, height = height, width
        blank: Any = np.zeros((height, width), np.float32)
        if decode is not _field:
            blank = Image.new("RGB" if decode is _rgb else "L", (width, height))
        file.decoded = {decode: [blank] * uses}
    return file


def _taken(content: bytes, decode: Decode) -> Any:
    """What was decoded ahead, else decoded now."""
    ready = content.decoded.get(decode) if isinstance(content, File) else None
    return ready.pop() if ready else decode(content)


def _rgb(content: bytes) -> Image.Image:
    with _decoding():
        picture = _upright(content)
        if picture.has_transparency_data:
            over = picture.convert("RGBA")
            white = Image.new("RGBA", over.size, "white")
            return Image.alpha_composite(white, over).convert("RGB")
        return _eight_bits(picture).convert("RGB")


def _grey(content: bytes) -> Image.Image:
    with _decoding():
        return _eight_bits(_upright(content)).convert("L")


def _field(content: bytes) -> np.ndarray:
    with _decoding():
        if content.startswith(_NPY):
            values = _npy(content)
        else:
            picture = _upright(content)
            picture = picture if picture.mode in (*_WIDE, "F") else picture.convert("L")
            values = np.asarray(picture).astype(np.float32)
    wrong = int(np.size(values) - np.count_nonzero(np.isfinite(values)))
    if wrong:
        raise _bad(f"{wrong:,} of its {values.size:,} numbers are NaN or infinite")
    return values


_BY_COLUMN: Mapping[str, Decode] = {"init_image": _rgb, "mask": _grey, "depth": _field}


def grey16(values_HW: np.ndarray) -> bytes:
    """A map of finite numbers as a grey 16-bit PNG, its least number 0 and its greatest 65535; a flat one all 0."""
    wide_HW = values_HW.astype(np.float64)
    low, high = wide_HW.min(), wide_HW.max()
    steps_HW = (wide_HW - low) / (high - low) * 65535 if high > low else np.zeros_like(wide_HW)
    return png(np.rint(steps_HW).astype(np.uint16))


def png(pixels: np.ndarray) -> bytes:
    """uint8 H W 3, uint8 H W or uint16 H W as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def to_tensor(picture: Image.Image) -> Any:
    """RGB -> torch float32 (3, H, W) in [-1, 1], rounded as diffusers rounds."""
    import torch

    pixels_HW3 = np.asarray(picture, np.float32) / 255.0
    return 2.0 * torch.from_numpy(pixels_HW3).permute(2, 0, 1).contiguous() - 1.0


# -- sizes


def fitted(picture: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    """The picture at that (width, height), by Lanczos: `stretch`; `crop`: the middle, filling it; `pad`: all of it,
    the edges' pixels repeated. As diffusers' VaeImageProcessor does in its modes default, crop and fill."""
    if picture.size == size:
        return picture
    if resize == "stretch":
        return picture.resize(size, Image.Resampling.LANCZOS)
    (width, height), (w, h) = size, picture.size
    wider = width * h > w * height  # the target, than the picture
    by_width = wider if resize == "crop" else not wider
    inner = (width, max(1, h * width // w)) if by_width else (max(1, w * height // h), height)
    _check_size(*inner)  # of a picture that is one long line this would be billions
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    scaled = picture.resize(inner, Image.Resampling.LANCZOS)
    if resize == "crop":
        return scaled.crop((-left, -top, width - left, height - top))
    return Image.fromarray(_padded(np.asarray(scaled), (width, height), left, top))


def at_aspect(values_HW: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """A map cut or padded to the aspect of (width, height), not resampled; `stretch` leaves it."""
    h, w = values_HW.shape
    width, height = size
    if resize == "stretch" or width * h == w * height:
        return values_HW
    wider = width * h > w * height
    if wider == (resize == "crop"):
        target = (w, max(1, round(w * height / width)))
    else:
        target = (max(1, round(h * width / height)), h)
    if resize == "crop":
        left, top = (w - target[0]) // 2, (h - target[1]) // 2
        return values_HW[top : top + target[1], left : left + target[0]]
    if target[0] * target[1] > MAX_PIXELS:
        raise _bad(f"padded to {target[0]} x {target[1]} it has more than {MAX_PIXELS:,} pixels")
    return _padded(values_HW, target, (target[0] - w) // 2, (target[1] - h) // 2)


def _padded(pixels: np.ndarray, size: tuple[int, int], left: int, top: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    sides = [(top, size[1] - height - top), (left, size[0] - width - left)]
    return np.pad(pixels, [*sides, (0, 0)][: pixels.ndim], mode="edge")


# -- decoding


def _bad(what: str) -> RowError:
    return RowError("bad_image", what)


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever a decoder raises is this row's failure: files from outside break them in every way."""
    try:
        yield
    except RowError:
        raise
    except Image.DecompressionBombError:  # Pillow's own alarm, at twice 89 million, comes before our look
        raise _bad(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        raise _bad(
            f"cannot be decoded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None


def _upright(content: bytes) -> Image.Image:
    """The first frame, turned as its EXIF orientation says."""
    picture = _opened(content)
    picture.load()
    return ImageOps.exif_transpose(picture)


def _opened(content: bytes) -> Image.Image:
    """The file by its header alone: its format and size are known, no pixel is decoded."""
    try:
        picture: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise _bad(f"not an image file of {', '.join(FORMATS)}") from None
    _check_size(*picture.size)
    return picture


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise _bad(f"{width} x {height} pixels, at most {MAX_PIXELS:,} in all")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow clips 16 bits at 255 where it should scale; 65535 becomes 255 here."""
    if picture.mode not in _WIDE and picture.mode != "F":
        return picture
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise _bad("numbers beyond 16 bits have no agreed white; save it with 8 or 16 bits a channel")
    return Image.fromarray((values / 257.0).round().astype(np.uint8))


def _npy(content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    shape = _npy_shape(file)
    file.seek(0)
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused as such
        return np.load(file, allow_pickle=False).reshape(shape).astype(np.float32)


def _npy_shape(file: io.BytesIO) -> tuple[int, int]:
    """Height and width by the header. Raises RowError where it is no map of plain numbers in bounds."""
    version = np.lib.format.read_magic(file)
    readers: dict[tuple[int, int], Callable[..., Any]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, kind = readers[version](file)
    plain = tuple(side for side in shape if side != 1) if len(shape) > 2 else shape
    if len(plain) != 2 or kind.kind not in "fiub":
        raise _bad(f"an array of shape {shape} and type {kind}; give height x width of plain numbers")
    _check_size(plain[1], plain[0])
    return plain[0], plain[1]
