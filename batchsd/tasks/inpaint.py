"""Inpainting: what the mask covers (white) is drawn anew, the rest is kept.

4-channel models: after every call  x <- m * x + (1 - m) * (alpha * z + sigma * noise)
9-channel models: the network is told the mask and the latents of the image with a grey hole
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from batchsd import images
from batchsd.tasks.inputs import (
    begin_of,
    check_channels,
    flag,
    latent_nearest,
    naming,
    needed,
    number,
    resize_mode,
    sized_init_image,
    with_channels,
)
from batchsd.tasks.text import draw_noise, prompted
from batchsd.tasks.told import SIZES
from batchsd.types import Blend, Conditioning, Kept, ModelFacts, Request, RowError

if TYPE_CHECKING:
    import torch

STRENGTH = 1.0  # of StableDiffusionInpaintPipeline


@dataclass(frozen=True, slots=True)
class InpaintTask:
    """Redraws the masked part of an init image, as diffusers' StableDiffusionInpaintPipeline does.

    Draws, in order: the image's posterior (for a 9-channel model of strength below 1 only), the noise, the
    masked image's posterior (for a 4-channel model drawn and left unused, as diffusers does); each one
    `torch.randn` of (1, C, H/f, W/f) in float32. Strength 1 starts from noise alone.
    """

    columns: tuple[str, ...] = ("init_image", "mask", "strength", "resize", "paste_back", *SIZES)

    def __call__(self, request: Request, model: ModelFacts, generator: torch.Generator) -> Conditioning:
        latents = model.latent_channels
        check_channels(request, model, {0: "text", latents + 1: "inpainting"})
        strength = number(request, "strength", STRENGTH, 0, 1)
        picture, mask_HW = _picture_and_mask(request, model.scale_factor)
        image_3HW, mask_1HW = images.to_tensor(picture), _tensor(mask_HW)
        blends, whole = not model.extra_channels, strength == 1
        clean_CHW = model.encode_image(image_3HW, generator) if blends or not whole else None
        shape = (latents, *(side // model.scale_factor for side in mask_1HW.shape[1:]))
        noise_CHW = draw_noise(shape, generator)
        small_1HW = latent_nearest(mask_1HW, model.scale_factor)
        branches, weights = prompted(request, model, shape)
        blend = None
        if blends:
            assert clean_CHW is not None
            draw_noise(shape, generator)
            blend = Blend(small_1HW, clean_CHW, noise_CHW)
        else:
            import torch

            hole_CHW = model.encode_image(image_3HW * (1 - mask_1HW), generator)
            branches = with_channels(branches, torch.cat([small_1HW, hole_CHW]))
        return Conditioning(
            branches=branches,
            weights=weights,
            noise_CHW=noise_CHW,
            clean_CHW=None if whole else clean_CHW,
            begin=begin_of(request.steps, strength),
            blend=blend,
            kept=Kept(mask_HW, np.asarray(picture)) if flag(request, "paste_back") else None,
        )


def _picture_and_mask(request: Request, factor: int) -> tuple[images.Picture, np.ndarray]:
    """The init image at the row's size, and the mask there: bool H W, True from mid-grey on. Raises RowError."""
    with naming("init_image"):
        picture, own = sized_init_image(request, factor)
    with naming("mask"):
        mask = images.grey(needed(request, "mask"))
        (w, h), (width, height) = mask.size, own
        if abs(w * height - h * width) > max(w, h, width, height):  # a pixel of rounding is no other aspect
            raise RowError(
                "bad_image", f"{w} x {h} pixels, the init image has {width} x {height}: another aspect"
            )
        fitted = images.fitted(mask, picture.size, resize_mode(request))
    return picture, np.asarray(fitted, np.float32) / 255 >= 0.5


def _tensor(mask_HW: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(mask_HW.astype(np.float32))[None]
