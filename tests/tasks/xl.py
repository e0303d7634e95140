"""A small SDXL with random weights, written and drawn by diffusers."""

from __future__ import annotations

from pathlib import Path

from batchsd.model.tokenizer import clip_tokenizer
from tests.model.ldm import networks


def write_xl(folder: Path, **facts: object) -> Path:
    """A whole StableDiffusionXLPipeline; `facts` are of its model_index.json."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    made = networks("SDXL")
    made.vae.register_to_config(scaling_factor=0.13025)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    StableDiffusionXLPipeline(
        vae=made.vae, text_encoder=made.texts[0], text_encoder_2=made.texts[1], unet=made.unet,
        tokenizer=clip_tokenizer("<|endoftext|>"), tokenizer_2=clip_tokenizer("!"),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **betas), **facts,
    ).save_pretrained(folder)  # fmt: skip
    return folder
