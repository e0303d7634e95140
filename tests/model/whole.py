"""Networks in the exact configs of the published checkpoints, and what both libraries are asked to compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchsd.model.checkpoint import Model
from tests.model.ldm import Networks

SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
TEXTS = {
    "SD1": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
            "hidden_act": "quick_gelu"},
    "SD2": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
            "hidden_act": "gelu"},
}  # fmt: skip
PADS = {"SD1": 49407, "SD2": 0}
CAT = [49406, 320, 1125, 539, 320, 2368, 49407]


def whole(case: str, in_channels: int) -> Networks:
    """SD1.5, SD2.1, ... with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    family = case[:3]
    shape = {**(SD1 if family == "SD1" else SD2), "in_channels": in_channels}
    if case == "SD2.1":
        shape |= {"upcast_attention": True, "sample_size": 96}
    unet = UNet2DConditionModel(**shape).eval()
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(**TEXTS[family], eos_token_id=49407)).eval()
    return Networks(family, unet, vae, [text])


def asked(channels: int, width: int) -> dict[str, Tensor]:
    """Inputs of a 256-pixel picture."""
    draw = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(1, channels, 32, 32, generator=draw),
        "context": torch.randn(1, 77, width, generator=draw),
        "picture": torch.rand(1, 3, 256, 256, generator=draw) * 2 - 1,
    }


@torch.no_grad()
def outputs(made: Networks, channels: int) -> dict[str, Tensor]:
    """What diffusers and transformers say."""
    given = asked(channels, made.unet.config.cross_attention_dim)
    ids = torch.tensor([CAT + [PADS[made.family]] * 70])
    z = given["latents"][:, :4]
    return {
        "unet": made.unet(given["latents"], torch.tensor([801]), given["context"]).sample,
        "decode": made.vae.decode(z).sample,
        "encode": made.vae.encode(given["picture"]).latent_dist.mean,
        "text": made.texts[0](ids).last_hidden_state,
    }


@torch.no_grad()
def ours(model: Model, channels: int) -> dict[str, Tensor]:
    given: dict[str, Any] = asked(channels, model.unet.config.context_dim)
    return {
        "unet": model.unet(given["latents"], torch.tensor([801]), given["context"]),
        "decode": model.vae.decode(given["latents"][:, :4]),
        "encode": model.vae.encode(given["picture"]).mean_BCHW,
        "text": model.encode_text(["a photo of a cat"]),
    }


def resident(kind: str) -> int:
    """Memory of this process in bytes: VmRSS now, VmHWM the most since `forget_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[kind].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


SDXL = {
    "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
    "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10], "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def asked_xl() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Latents, timestep, text states, pooled text and sizes for SDXL's U-Net."""
    given = asked(4, 2048)
    pooled = torch.randn(1, 1280, generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([[256.0, 256, 0, 0, 256, 256]])
    return given["latents"], torch.tensor([801]), given["context"], {"text_embeds": pooled, "time_ids": sizes}
