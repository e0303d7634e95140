"""Reduced checkpoints of each family by diffusers and transformers, and their way into LDM's single-file layout.

`to_ldm` is the map of LDM's own code read backwards, written apart from batchsd's, key for key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

UNETS: dict[str, dict[str, Any]] = {
    "SD1": {"block_out_channels": (32, 64), "attention_head_dim": 8, "cross_attention_dim": 64},
    "SD2": {
        "block_out_channels": (64, 128), "attention_head_dim": (1, 2), "cross_attention_dim": 128,
        "use_linear_projection": True,
    },
    "SDXL": {
        "block_out_channels": (64, 128), "attention_head_dim": (1, 2), "cross_attention_dim": 64 + 128,
        "use_linear_projection": True, "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 64 + 6 * 256,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@dataclass(frozen=True)
class Networks:
    """One checkpoint in diffusers' classes."""

    family: str
    unet: Any
    vae: Any
    texts: list[Any]


def networks(family: str, in_channels: int = 4, seed: int = 0) -> Networks:
    """Random weights in a reduced config of the family; widths keep the family's rules (64 a head, 32 groups)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(seed)
    shape = {**BLOCKS, **UNETS[family], "in_channels": in_channels, "sample_size": 8}
    unet = UNet2DConditionModel(**shape).eval()
    vae = AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    if family == "SD1":
        texts = [clip(64, "quick_gelu")]
    elif family == "SD2":
        texts = [clip(128, "gelu")]
    else:
        texts = [clip(64, "quick_gelu"), clip(128, "gelu", projection=64)]
    return Networks(family, unet, vae, texts)


def clip(width: int, act: str, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=width // 64,
        hidden_act=act, eos_token_id=49407, projection_dim=projection or 512,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def to_ldm(model: Networks) -> dict[str, Tensor]:
    """The whole checkpoint as LDM's code names it, with the odds and ends that real files carry."""
    state = {f"model.diffusion_model.{name}": v for name, v in unet_to_ldm(model.unet.state_dict()).items()}
    state |= {f"first_stage_model.{name}": v for name, v in vae_to_ldm(model.vae.state_dict()).items()}
    first = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in model.texts[0].state_dict().items()}
    if model.family == "SD1":
        state |= {f"cond_stage_model.transformer.{name}": v for name, v in first.items()}
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    elif model.family == "SD2":
        state |= {f"cond_stage_model.model.{name}": v for name, v in openclip(first, spare_layer=True).items()}
    else:
        state |= {f"conditioner.embedders.0.transformer.{name}": v for name, v in first.items()}
        second = openclip(model.texts[1].state_dict(), spare_layer=False)
        state |= {f"conditioner.embedders.1.model.{name}": v for name, v in second.items()}
    state |= {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000)}
    return {name: value.contiguous().clone() for name, value in state.items()}


def unet_to_ldm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    attention = {m[1] for name in state if (m := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    heads = {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip

    def rename(name: str) -> str:
        for theirs, ldm in heads.items():
            if name.startswith(theirs + "."):
                return inside(ldm + name[len(theirs) :])
        way, level, part, layer, rest = name.split(".", 4)
        block, step = 3 * int(level) + int(layer), {"resnets": 0, "attentions": 1}.get(part)
        if part == "downsamplers":
            return f"input_blocks.{3 * int(level) + 3}.0.op.{rest.removeprefix('conv.')}"
        if part == "upsamplers":
            return f"output_blocks.{3 * int(level) + 2}.{2 if level in attention else 1}.{rest}"
        return inside(
            f"{'input' if way == 'down_blocks' else 'output'}_blocks.{block + (way == 'down_blocks')}.{step}.{rest}"
        )

    def inside(name: str) -> str:
        for theirs, ldm in (
            ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
        ):  # fmt: skip
            if "transformer_blocks" not in name:
                name = re.sub(rf"\.{theirs}\.(weight|bias)$", rf".{ldm}.\1", name)
        return name

    return {rename(name): value for name, value in state.items()}


def vae_to_ldm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))

    def rename(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        for theirs, ldm in (
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            name = name.replace(f"attn_1.{theirs}.", f"attn_1.{ldm}.")
        return name.replace("conv_shortcut", "nin_shortcut")

    renamed = {rename(name): value for name, value in state.items()}
    return {n: v[:, :, None, None] if ".attn_1." in n and v.ndim == 2 else v for n, v in renamed.items()}


def openclip(state: dict[str, Tensor], spare_layer: bool) -> dict[str, Tensor]:
    """open_clip's names; `spare_layer` adds the last layer that SD2's file has and never uses."""
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    embeddings = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
    }
    found = {**embeddings, "logit_scale": torch.ones(())}
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    for i in range(layers + spare_layer):
        old, new = f"encoder.layers.{min(i, layers - 1)}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            thirds = [state[f"{old}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            found[f"{new}attn.in_proj_{kind}"] = torch.cat(thirds)
            for theirs, ours in (
                ("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
                ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
            ):  # fmt: skip
                found[f"{new}{ours}.{kind}"] = state[f"{old}{theirs}.{kind}"]
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = state[f"final_layer_norm.{kind}"]
    projection = state.get("text_projection.weight")
    found["text_projection"] = torch.zeros(8, 8) if projection is None else projection.T
    return found
