"""The filter `mine`: the reason to reject a picture, or None; here pictures with hardly any colour."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchsd import Filter, Request, hookimpl

LEAST = 2.0  # mean distance of the channels, of 255


def grey(requests: Sequence[Request], pictures: Sequence[np.ndarray]) -> list[str | None]:
    """A reason or None a picture. Pictures are uint8 arrays of height x width x 3; requests have `prompt`..."""
    spread = [float(np.ptp(picture.astype(int), axis=2).mean()) for picture in pictures]
    return [f"grey: its channels differ by {value:.1f}" if value < LEAST else None for value in spread]


@hookimpl
def register_filters() -> dict[str, Filter]:
    # With weights: Filter(load, files=("weights",)), where load(settings, device) gives such a function.
    return {"mine": Filter.of(grey)}
