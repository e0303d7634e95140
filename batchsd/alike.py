"""Pictures that look alike: groups of 64-bit hashes linked by pairs that differ in few bits. Exact, without all pairs.

Of 6 bands of bits at most 3 hold one of 3 differing bits, so the other 3 are equal (the pigeonhole principle, as in
multi-index hashing: Norouzi, Punjani and Fleet, 2012). For each of the 20 choices of 3 bands, hashes are sorted by
these 32 bits and each is compared with those that share them: about n^1.5 pairs where pictures differ in few bits at
all (each band has bits of all of the picture), far fewer else. Equal hashes count once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

APART = 3
"""Bits of 64: within it a picture saved again at another size or quality lies; beyond 10 little is alike (Krawetz)."""

BANDS = [sum(1 << bit for bit in range(band, 64, 2 * APART)) for band in range(2 * APART)]


def groups(hashes: Sequence[str]) -> list[list[int]]:
    """Which hashes (16 hex digits each) are linked, by their places: groups of two and more, the largest first.

    A group is closed under the link: its members may differ in more than `APART` bits through those between.
    """
    import numpy as np

    codes, places = np.unique(np.array([int(text, 16) for text in hashes], np.uint64), return_inverse=True)
    found: dict[int, list[int]] = {}
    for place, root in enumerate(linked(codes)[places].tolist()):
        found.setdefault(root, []).append(place)
    return sorted((group for group in found.values() if len(group) > 1), key=lambda group: (-len(group), group))


def linked(codes: np.ndarray) -> np.ndarray:
    """For each of the codes (uint64, no two equal) the place of one that stands for its group."""
    import numpy as np

    root = np.arange(len(codes))
    for bands in combinations(BANDS, APART):
        keys = codes & np.uint64(sum(bands))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first, step = np.arange(len(codes)), 1
        while len(first := first[first + step < len(codes)]):
            first = first[keys[first] == keys[first + step]]  # sorted: what ends here ends for all longer steps
            one, other = order[first], order[first + step]
            close = near(codes[one], codes[other]) & (root[one] != root[other])
            if close.any():
                root = joined(root, one[close], other[close])
            step += 1
    return root


def near(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether they differ in at most `APART` bits: clearing the lowest bit so often leaves none."""
    import numpy as np

    left = one ^ other
    for _ in range(APART):
        left &= left - np.uint64(1)  # 0 - 1 is all ones: 0 stays 0
    return left == 0


def joined(root: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`root` where each of `one` and its `other` are of one group; the least place stands for it."""
    import numpy as np

    up = np.arange(len(root))
    for a, b in zip(root[one].tolist(), root[other].tolist(), strict=True):
        while up[a] != a:
            a = up[a]
        while up[b] != b:
            b = up[b]
        up[max(a, b)] = min(a, b)
    while not np.array_equal(higher := up[up], up):
        up = higher
    return up[root]
