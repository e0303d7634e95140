"""Text to image: the network is told the prompt, and with guidance g also the negative prompt.

    prediction = (1 - g) * net(negative) + g * net(prompt)

The row's only draw is the starting noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchsd.types import Branch, Conditioning, ModelFacts, Request, RowError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TextTask:
    """Draws from noise alone, as diffusers' StableDiffusionPipeline does.

    Draws, in order: the noise, one `torch.randn` of shape (1, C, H/f, W/f) in float32 from the row's
    generator.
    """

    columns: tuple[str, ...] = ()

    def __call__(self, request: Request, model: ModelFacts, generator: torch.Generator) -> Conditioning:
        if model.extra_channels:
            raise RowError(
                "bad_input",
                f"task 'text' cannot fill the {model.extra_channels} extra input channels of this checkpoint "
                "(made for depth, inpainting or editing): choose that task, or a plain text checkpoint",
            )
        return Conditioning(
            branches=prompt_branches(request),
            weights=guidance_weights(request.guidance_scale),
            noise_CHW=draw_noise(latent_shape(request, model), generator),
        )


def prompt_branches(request: Request) -> tuple[Branch, ...]:
    """The negative prompt first, then the prompt (diffusers' order); guidance <= 1 needs the prompt alone.

    A negative that is not given is the empty text, as SD 1 and 2 were trained to drop their captions.
    """
    if request.guidance_scale <= 1:
        return (Branch(request.prompt),)
    return (Branch(request.negative_prompt or ""), Branch(request.prompt))


def guidance_weights(guidance: float) -> Callable[[float], Sequence[float]]:
    """Weights of `prompt_branches` at any sigma: (1 - g, g), or (1,) where guidance <= 1."""
    weights = (1.0,) if guidance <= 1 else (1.0 - guidance, guidance)
    return lambda sigma: weights


def latent_shape(request: Request, model: ModelFacts) -> tuple[int, int, int]:
    """(C, H/f, W/f) of the row's latents; a side that is not given is the model's native size.

    Raises RowError `bad_input` where a side in pixels is not a positive multiple of the scale factor f.
    """
    sides = []
    for name, given in (("height", request.height), ("width", request.width)):
        pixels = model.native_size if given is None else given
        if pixels <= 0 or pixels % model.scale_factor:
            raise RowError("bad_input", f"{name} {pixels} is not a positive multiple of {model.scale_factor}")
        sides.append(pixels // model.scale_factor)
    return (model.latent_channels, sides[0], sides[1])


def draw_noise(shape_CHW: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Unit Gaussian noise, float32 on the CPU whatever the network's dtype and device."""
    import torch

    return torch.randn((1, *shape_CHW), generator=generator, dtype=torch.float32)[0]
