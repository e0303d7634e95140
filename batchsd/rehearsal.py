"""Rows tried by their own tasks on a model that computes nothing: what a task would refuse is found without a GPU.

    the checkpoint's headers -> Hollow;    task(row, Hollow) -> a RowError, or nothing

A row's images are blank, of the size in their headers (`images.looked_at`). Rows that differ only in their words and
seeds are tried once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsd.images import File
from batchsd.types import Request, RowError, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

Judge = Callable[[Request], str | None]
"""What is wrong with a row that reads well, or None."""

REMEMBERED = 100_000  # kinds of rows


@dataclass(frozen=True)
class Hollow:
    """`types.ModelFacts` of a checkpoint whose weights are not read: its networks give zeros."""

    latent_channels: int
    extra_channels: int
    scale_factor: int
    native_size: int
    zero_negative: bool
    takes_sizes: bool
    guidance_dim: int
    depth: bool

    def encode_image(self, image_3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self.encode_mode(image_3HW)

    def encode_mode(self, image_3HW: torch.Tensor) -> torch.Tensor:
        height, width = (side // self.scale_factor for side in image_3HW.shape[1:])
        return image_3HW.new_zeros(self.latent_channels, height, width)

    def estimate_depth(self, picture_HW3: np.ndarray, convention: str = "diffusers") -> np.ndarray | None:
        return picture_HW3[..., 0].astype("float32") * 0 if self.depth else None


def hollow(path: Path, vae: str = "", ema: bool = False) -> Hollow:
    """From the headers of a checkpoint's files. Raises UsageError where it is none."""
    from batchsd.model.checkpoint import networks, read_parts

    parts = read_parts(path, vae, ema)
    networks_here = networks(parts)
    unet, autoencoder = networks_here[0].config, networks_here[1].config
    return Hollow(
        latent_channels=autoencoder.latent_channels,
        extra_channels=unet.in_channels - autoencoder.latent_channels,
        scale_factor=autoencoder.factor,
        native_size=unet.sample_size * autoencoder.factor,
        zero_negative=parts.zero_negative,
        takes_sizes=unet.added_dim > 0,
        guidance_dim=unet.guidance_dim,
        depth=parts.depth is not None,
    )


def rehearsal(model: Hollow, tasks: Mapping[str, Task]) -> Judge:
    """Tries rows; a plugin's task that raises anything else than RowError is left to the run."""
    import torch

    known: dict[Hashable, str | None] = {}

    def tried(request: Request) -> str | None:
        try:
            tasks[request.task](request, model, torch.Generator())
        except RowError as error:
            return str(error)
        except Exception:  # e.g. it looks at more than its columns
            return None
        return None

    def judge(request: Request) -> str | None:
        kind = kind_of(request)
        if kind not in known:
            if len(known) >= REMEMBERED:
                known.clear()
            known[kind] = tried(request)
        return known[kind]

    return judge


def kind_of(request: Request) -> Hashable:
    """All that a task's refusal may rest on."""
    inputs = tuple(sorted((name, seen(value)) for name, value in request.inputs.items()))
    given = request.negative_prompt is None
    return (request.task, request.height, request.width, request.steps, request.guidance_scale > 1, given, inputs)


def seen(value: Any) -> str:
    """An input by its value, an image by its size alone."""
    if isinstance(value, File):
        return ", ".join(str(getattr(blanks[0], "size", 0)) for blanks in value.decoded.values() if blanks)
    return repr(value)
