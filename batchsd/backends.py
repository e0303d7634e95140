"""How the network is run: a table of functions from a U-Net to something called like it.

    eager      as it stands: every call has just the lanes that it needs
    compile    torch.compile: fused kernels, made once for each shape, so calls come in few shapes: L, L/2, L/4, ... 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from batchsd.model.unet import UNet


@dataclass(frozen=True)
class Backend:
    """`prepare` makes the network callable; `batch(used, slots)` is the size of a call for `used` of `slots` lanes."""

    prepare: Callable[[UNet], Callable[..., Any]]
    batch: Callable[[int, int], int]


def as_many(used: int, slots: int) -> int:
    return used


def whole(used: int, slots: int) -> int:
    """All calls alike: what a row gets then does not depend on how many others there are."""
    return slots


def halves(used: int, slots: int) -> int:
    """The smallest of slots, slots / 2, slots / 4, ... that holds them."""
    while slots // 2 >= used:
        slots //= 2
    return slots


def compiled(unet: UNet) -> Callable[..., Any]:
    # A kernel for each shape: sizes, batches, and with or without a mask for texts of several lengths.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    return torch.compile(unet, dynamic=False)


BACKENDS: Mapping[str, Backend] = {
    "eager": Backend(lambda unet: unet, as_many),
    "compile": Backend(compiled, halves),
}

