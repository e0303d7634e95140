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


def dpt_to_midas(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' DPT-hybrid as MiDaS' code names it, with the classifier that its file carries along."""
    found = {"pretrained.model.head.weight": torch.zeros(1), "pretrained.model.head.bias": torch.zeros(1)}
    backbone = "dpt.embeddings.backbone.bit."
    for name, value in state.items():
        if name.startswith(backbone):
            name = name.replace(backbone + "embedder.convolution.", "stem.conv.").replace(
                backbone + "embedder.", "stem."
            )
            name = name.removeprefix(backbone + "encoder.").replace(".layers.", ".blocks.")
            found[f"pretrained.model.patch_embed.backbone.{name}"] = value
        elif name.startswith("dpt.encoder.layer."):
            _, _, _, number, rest = name.split(".", 4)
            if ".query." in rest:
                three = [state[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
                found[f"pretrained.model.blocks.{number}.attn.qkv.{rest.split('.')[-1]}"] = torch.cat(three)
            elif ".key." not in rest and ".value." not in rest:
                part, kind = rest.rsplit(".", 1)
                inner = {
                    "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
                    "layernorm_before": "norm1", "layernorm_after": "norm2",
                }[part]  # fmt: skip
                found[f"pretrained.model.blocks.{number}.{inner}.{kind}"] = value
        elif name.startswith("neck.fusion_stage.layers."):
            _, _, _, number, rest = name.split(".", 4)
            rest = rest.replace("residual_layer", "resConfUnit").replace("convolution", "conv")
            found[f"scratch.refinenet{4 - int(number)}.{rest.replace('projection.', 'out_conv.')}"] = value
        else:
            found[_midas_end(name)] = value
    return found


def _midas_end(name: str) -> str:
    for number in range(4):
        for theirs, ours in (
            (
                f"neck.reassemble_stage.readout_projects.{number}.0",
                f"pretrained.act_postprocess{number + 1}.0.project.0",
            ),
            (f"neck.reassemble_stage.layers.{number}.projection", f"pretrained.act_postprocess{number + 1}.3"),
            (f"neck.reassemble_stage.layers.{number}.resize", f"pretrained.act_postprocess{number + 1}.4"),
            (f"neck.convs.{number}", f"scratch.layer{number + 1}_rn"),
        ):
            name = name.replace(theirs + ".", ours + ".")
    for theirs, ours in (
        ("dpt.embeddings.cls_token", "pretrained.model.cls_token"), ("dpt.layernorm", "pretrained.model.norm"),
        ("dpt.embeddings.position_embeddings", "pretrained.model.pos_embed"), ("head.head", "scratch.output_conv"),
        ("dpt.embeddings.projection", "pretrained.model.patch_embed.proj"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name
