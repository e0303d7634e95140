"""Cheap figures of a picture, as it was drawn (before a lossy format changes it): three columns of every row.

    mean, deviation   of all its pixel values, 0 (black) to 1 (white): a deviation near 0 is a flat picture
    dhash             64 bits, a bit a pair of neighbours: is the right one brighter? on a grey 9 x 8 copy

Pictures that differ in few bits of `dhash` look alike (N. Krawetz, 2013). It is written as 16 hex digits: where a
column has nulls pandas reads whole numbers as floats, which hold 53 of 64 bits. Equals imagehash's `dhash`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import numpy as np


class Figures(TypedDict, total=False):
    """What there is to say of a picture; nothing of one that was not drawn."""

    mean: float
    deviation: float
    dhash: str


def figures(picture_HW3: np.ndarray) -> Figures:
    """The figures of a picture of uint8 numbers."""
    mean, deviation = moments(picture_HW3)
    return {"mean": mean, "deviation": deviation, "dhash": dhash(picture_HW3)}


def moments(picture_HW3: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of all pixel values, over 255.

    From whole numbers, so that no machine rounds a sum otherwise.
    """
    import numpy as np

    counts = np.bincount(picture_HW3.ravel(), minlength=256).tolist()
    total = sum(counts)
    first = sum(value * count for value, count in enumerate(counts))
    second = sum(value * value * count for value, count in enumerate(counts))
    return first / total / 255, math.sqrt(second * total - first * first) / total / 255


def dhash(picture_HW3: np.ndarray) -> str:
    """64 bits, row by row, the first one highest: 1 where a pixel of the grey 9 x 8 copy is darker than its right."""
    import numpy as np
    from PIL import Image

    small = Image.fromarray(picture_HW3).convert("L").resize((9, 8), Image.Resampling.LANCZOS)
    grey_89 = np.asarray(small)
    return np.packbits(grey_89[:, 1:] > grey_89[:, :-1]).tobytes().hex()
