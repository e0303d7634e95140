"""What a checkpoint on disk comes down to, whatever its layout: configs and tensors under diffusers' names.

Tensors are views of mapped files, so that taking parts apart reads nothing; `checkpoint.load` builds networks
of them, `inspect` only compares their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchsd.model.weights import State


@dataclass(frozen=True)
class TextParts:
    """One text encoder: transformers' config keys, its tensors, its tokenizer, and its place for errors."""

    config: Mapping[str, Any]
    state: State
    tokenizer: Callable[[], Any]
    where: str


@dataclass(frozen=True)
class DepthParts:
    """SD2-depth's own depth network: transformers' DPT config keys, its tensors, and its place for errors.

    `preprocessor` holds the keys of DPTImageProcessor's config; those left out are SD2-depth's.
    """

    config: Mapping[str, Any]
    state: State
    where: str
    preprocessor: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """A checkpoint taken apart. `reasons` say, a line each, what was recognised and why."""

    where: str
    family: str
    unet_config: Mapping[str, Any]
    unet: State
    vae_config: Mapping[str, Any]
    vae: State
    texts: tuple[TextParts, ...]
    scheduler: Mapping[str, Any]
    # A negative prompt that is not given is zeros, not the empty text.
    zero_negative: bool = False
    reasons: tuple[str, ...] = ()
    depth: DepthParts | None = None
