"""Text to image: the network is told the prompt, and with guidance g also the negative prompt.

    prediction = (1 - g) * net(negative) + g * net(prompt)

The row's only draw is the starting noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchsd.tasks.told import SIZES, guidance_told, sizes_told
from batchsd.types import Branch, Conditioning, ModelFacts, Request, RowError

if TYPE_CHECKING:
    import torch

Weights = Callable[[float], Sequence[float]]
"""Of each branch, at a sigma."""


@dataclass(frozen=True, slots=True)
class TextTask:
    """Draws from noise alone, as diffusers' StableDiffusionPipeline does.

    Draws, in order: the noise, one `torch.randn` of shape (1, C, H/f, W/f) in float32 from the row's
    generator.
    """

    columns: tuple[str, ...] = SIZES

    def __call__(self, request: Request, model: ModelFacts, generator: torch.Generator) -> Conditioning:
        if model.extra_channels:
            raise RowError(
                "bad_input",
                f"task 'text' cannot fill the {model.extra_channels} extra input channels of this checkpoint "
                "(made for depth, inpainting or editing): choose that task, or a plain text checkpoint",
            )
        shape_CHW = latent_shape(request, model)
        branches, weights = prompted(request, model, shape_CHW)
        return Conditioning(
            branches=branches,
            weights=weights,
            noise_CHW=draw_noise(shape_CHW, generator),
        )


def prompted(request: Request, model: ModelFacts, shape_CHW: Sequence[int]) -> tuple[tuple[Branch, ...], Weights]:
    """The row's branches, and their weights at any sigma; `shape_CHW` is that of its latents.

    The negative prompt first, then the prompt (diffusers' order), weighted (1 - g, g); guidance <= 1 needs the
    prompt alone, and so does a network that is told its guidance (LCM; a negative prompt has no place there). A
    negative that is not given is the empty text, as SD 1 and 2 were trained to drop their captions; in SDXL zeros.
    """
    added = {**sizes_told(request, model, shape_CHW), **guidance_told(request.guidance_scale, model.guidance_dim)}
    branch = Branch(request.prompt, added=added)
    if request.guidance_scale <= 1 or model.guidance_dim:
        return (branch,), lambda sigma: (1.0,)
    weights = (1.0 - request.guidance_scale, request.guidance_scale)
    return (Branch(negative_of(request, model), added=added), branch), lambda sigma: weights


def negative_of(request: Request, model: ModelFacts) -> str | None:
    """What the network is told instead of the prompt; None, zeros, only where the checkpoint wants them."""
    if request.negative_prompt is None and not model.zero_negative:
        return ""
    return request.negative_prompt


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
