"""Distilled checkpoints: `scheduler = "model"` draws what diffusers' pipeline draws with the folder's own scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from batchsd.model.checkpoint import load
from tests.conftest import write_checkpoint
from tests.tasks.test_parity import agree, draw, engine, picture, pixels, png, request, theirs

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LCM = {**BETAS, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "leading"}
TRAILING = {**BETAS, "timestep_spacing": "trailing", "steps_offset": 1}

# The class and settings that the hub's folder of each has, steps and guidance of its model card.
PLAIN: dict[str, tuple[str, dict[str, Any], int, float]] = {
    "SD-Turbo, 1 step": ("EulerDiscreteScheduler", TRAILING, 1, 0.0),
    "SD-Turbo, 4 steps": ("EulerDiscreteScheduler", TRAILING, 4, 0.0),
    "SDXL-Turbo": ("EulerAncestralDiscreteScheduler", TRAILING, 4, 0.0),
    "Lightning, 4 steps": ("EulerDiscreteScheduler", TRAILING, 4, 0.0),
    "Lightning, 1 step": ("EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}, 1, 0.0),
    "Hyper-SD": ("TCDScheduler", {**BETAS, "timestep_spacing": "trailing", "steps_offset": 1}, 3, 0.0),
    "LCM-LoRA": ("LCMScheduler", LCM, 4, 1.0),
    "LCM-LoRA, with guidance": ("LCMScheduler", LCM, 6, 2.0),
}


def with_scheduler(folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """Writes it into the folder, and gives it."""
    import diffusers

    scheduler = getattr(diffusers, name)(**settings)
    scheduler.save_pretrained(folder / "scheduler")
    return scheduler


@pytest.mark.parametrize("name", PLAIN)
def test_plain_networks(tmp_path: Path, name: str) -> None:
    from diffusers import StableDiffusionPipeline

    kind, settings, steps, guidance = PLAIN[name]
    folder = write_checkpoint(tmp_path / "model")
    scheduler = with_scheduler(folder, kind, settings)
    asked = request("text", scheduler="model", steps=steps, guidance_scale=guidance)
    (record,) = draw(engine(folder), asked)
    pipe = StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    eta = {"eta": 0.3} if kind == "TCDScheduler" else {}  # the scheduler's own, which the pipeline would set to 0
    agree(pixels(record), theirs(pipe, asked, height=16, width=16, **eta))


def test_lcm_lora_is_a_lora_like_any_other(checkpoint: Path, tmp_path: Path) -> None:
    """kohya's names with alpha, resnets' convolutions and time projections among them, as the hub's LCM-LoRA has."""
    layers = {
        "down_blocks_0_resnets_0_time_emb_proj": (32, 128),
        "down_blocks_0_attentions_0_proj_in": (32, 32),
        "mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (512, 64),
    }
    state = {}
    for name, (out, inside) in layers.items():
        conv = (1, 1) if "proj_in" in name else ()
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, inside, *conv)
        state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, 4, *conv)
        state[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "lcm.safetensors")
    before, after = load(checkpoint).unet, load(checkpoint, loras=[str(tmp_path / "lcm.safetensors")]).unet
    changed = {n for n, v in after.named_parameters() if not torch.equal(v, before.get_parameter(n))}
    assert changed == {
        "down_blocks.0.resnets.0.time_emb_proj.weight", "down_blocks.0.attentions.0.proj_in.weight",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
    }  # fmt: skip


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("lcm"), time_cond_proj_dim=24)
    with_scheduler(folder, "LCMScheduler", LCM)
    return folder


@pytest.mark.parametrize(("steps", "guidance"), [(4, 8.5), (1, 8.5), (8, 3.0), (4, 1.0)])
def test_lcm_in_full_is_told_its_guidance(lcm: Path, steps: int, guidance: float) -> None:
    asked = request("text", scheduler="model", steps=steps, guidance_scale=guidance, negative_prompt=None)
    (record,) = draw(engine(lcm), asked)
    agree(pixels(record), theirs(pipeline(lcm, "LatentConsistencyModelPipeline"), asked, height=16, width=16))


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_lcm_in_full_from_an_image(lcm: Path, strength: float) -> None:
    """As StableDiffusionImg2ImgPipeline: some of the steps. (LCM's own pipeline takes all of them, closer together.)"""
    asked = request(
        "image", scheduler="model", steps=4, guidance_scale=8.5, negative_prompt=None,
        inputs={"init_image": png(picture()), "strength": strength},
    )  # fmt: skip
    (record,) = draw(engine(lcm), asked)
    pipe = pipeline(lcm, "StableDiffusionImg2ImgPipeline")
    agree(pixels(record), theirs(pipe, asked, image=picture(), strength=strength))


def pipeline(folder: Path, kind: str) -> Any:
    """diffusers' pipeline of that class, called without a negative prompt: LCM's knows none."""
    import diffusers

    whole = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, scheduler=diffusers.LCMScheduler(**LCM), safety_checker=None
    )
    parts = {name: part for name, part in whole.components.items() if name != "image_encoder"}
    pipe = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return lambda *args, negative_prompt=None, **named: pipe(*args, **named)
