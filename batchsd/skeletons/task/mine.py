"""The task `mine`: what the network is told for a row; here the prompt, and with it a second one, half and half.

    id, prompt,       also
    1,  "a red cube", "a blue cube"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchsd import Branch, Conditioning, ModelFacts, Request, RowError, hookimpl

if TYPE_CHECKING:
    import torch  # slow to import, and a plan needs no more than the name of this task


@dataclass(frozen=True)
class Both:
    """`columns` are what it reads of the manifest, as `request.inputs`. It draws the starting noise and no more."""

    columns: tuple[str, ...] = ("also",)

    def __call__(self, request: Request, model: ModelFacts, generator: torch.Generator) -> Conditioning:
        import torch

        if model.extra_channels:
            raise RowError("bad_input", "task 'mine' is for checkpoints that draw from text alone")
        also = request.inputs.get("also")
        if also is not None and not isinstance(also, str):
            raise RowError("bad_input", "`also` is not a text")
        sides = [model.native_size if side is None else side for side in (request.height, request.width)]
        if any(side <= 0 or side % model.scale_factor for side in sides):
            raise RowError("bad_input", f"a side is no positive multiple of {model.scale_factor}")
        shape = (1, model.latent_channels, *(side // model.scale_factor for side in sides))
        noise_CHW = torch.randn(shape, generator=generator, dtype=torch.float32)[0]
        g = request.guidance_scale
        told = [request.negative_prompt or "", request.prompt, also or request.prompt]
        weights = (1 - g, g / 2, g / 2)  # they sum to 1
        return Conditioning(tuple(Branch(text) for text in told), lambda sigma: weights, noise_CHW)


@hookimpl
def register_tasks() -> dict[str, Both]:
    return {"mine": Both()}
