"""Editing by instruction (instruct-pix2pix): the network sees the image's latents beside the noisy ones.

prediction = e(0, "") + s_I (e(image, "") - e(0, "")) + s_T (e(image, prompt) - e(image, ""))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchsd import images
from batchsd.tasks.inputs import check_channels, init_image, number
from batchsd.tasks.text import draw_noise, negative_of
from batchsd.types import Branch, Conditioning, ModelFacts, Request

if TYPE_CHECKING:
    import torch

IMAGE_GUIDANCE = 1.5  # of StableDiffusionInstructPix2PixPipeline


@dataclass(frozen=True, slots=True)
class EditTask:
    """Changes an init image as the prompt says, as diffusers' StableDiffusionInstructPix2PixPipeline does.

    The image's latents are the posterior's mode, not scaled. Draws: the noise alone, one `torch.randn` of
    (1, C, H/f, W/f) in float32. With guidance <= 1 or image guidance < 1 the network is asked once a step.
    """

    columns: tuple[str, ...] = ("init_image", "image_guidance_scale", "resize")

    def __call__(self, request: Request, model: ModelFacts, generator: torch.Generator) -> Conditioning:
        check_channels(request, model, {model.latent_channels: "editing"})
        image_guidance = number(request, "image_guidance_scale", IMAGE_GUIDANCE, -math.inf, math.inf)
        picture = init_image(request, model.scale_factor)
        source_CHW = model.encode_mode(images.to_tensor(picture))
        branches: tuple[Branch, ...] = (Branch(request.prompt, source_CHW),)
        weights: tuple[float, ...] = (1.0,)
        if request.guidance_scale > 1 and image_guidance >= 1:
            nothing = Branch(negative_of(request, model), source_CHW * 0)
            seeing = Branch(negative_of(request, model), source_CHW)
            branches = (nothing, seeing, *branches)
            weights = (1 - image_guidance, image_guidance - request.guidance_scale, request.guidance_scale)
        return Conditioning(
            branches=branches,
            weights=lambda sigma: weights,
            noise_CHW=draw_noise(source_CHW.shape, generator),
        )
