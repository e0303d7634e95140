"""Image to image: the walk starts from the init image's latents, noised to the level that `strength` says.

x_begin = alpha * z + sigma * noise,    begin = steps - int(steps * strength)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchsd import images
from batchsd.tasks.inputs import begin_of, check_channels, init_image, number
from batchsd.tasks.text import draw_noise, prompted
from batchsd.tasks.told import SIZES
from batchsd.types import Conditioning, ModelFacts, Request

if TYPE_CHECKING:
    import torch

STRENGTH = 0.8  # of StableDiffusionImg2ImgPipeline and StableDiffusionDepth2ImgPipeline


@dataclass(frozen=True, slots=True)
class ImageTask:
    """Redraws an init image, as diffusers' StableDiffusionImg2ImgPipeline does.

    Draws, in order: the init image's posterior, then the noise, each one `torch.randn` of (1, C, H/f, W/f) in
    float32. Strength 1 takes every step and still starts from the noised image; where no step is left
    (strength 0) the picture is the VAE's round trip.
    """

    columns: tuple[str, ...] = ("init_image", "strength", "resize", *SIZES)

    def __call__(self, request: Request, model: ModelFacts, generator: torch.Generator) -> Conditioning:
        check_channels(request, model, {0: "text"})
        strength = number(request, "strength", STRENGTH, 0, 1)
        picture = init_image(request, model.scale_factor)
        clean_CHW = model.encode_image(images.to_tensor(picture), generator)
        branches, weights = prompted(request, model, clean_CHW.shape)
        return Conditioning(
            branches=branches,
            weights=weights,
            noise_CHW=draw_noise(clean_CHW.shape, generator),
            clean_CHW=clean_CHW,
            begin=begin_of(request.steps, strength),
        )
