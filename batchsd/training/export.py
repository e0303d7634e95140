"""Writes what was trained as an ordinary diffusers-layout folder, in fp16, that any SD tool opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from batchsd.model.config import UNetConfig, VAEConfig

_DIFFUSERS_VERSION = "0.42.1"  # of the config format that is written here


def unet_json(config: UNetConfig) -> dict[str, Any]:
    """`unet/config.json` in diffusers' keys: the inverse of `model.config.unet_config`."""
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": list(config.layers),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.down_attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in config.up_attention],
        "attention_head_dim": list(config.heads),
        "cross_attention_dim": config.context_dim,
        "norm_num_groups": config.groups,
        "norm_eps": config.norm_eps,
        "use_linear_projection": config.linear_projection,
        "upcast_attention": config.upcast_attention,
        "downsample_padding": config.downsample_padding,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": config.freq_shift,
        "sample_size": config.sample_size,
    }


def vae_json(config: VAEConfig, sample_size: int) -> dict[str, Any]:
    """`vae/config.json` in diffusers' keys: the inverse of `model.config.vae_config`."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": config.groups,
        "act_fn": "silu",
        "scaling_factor": config.scaling_factor,
        "sample_size": sample_size,
    }


def scheduler_json(prediction_type: str) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`: DDIM on SD's noise schedule."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": prediction_type,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }


_PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": _DIFFUSERS_VERSION,
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


def export(
    folder: Path,
    *,
    unet: tuple[UNetConfig, Mapping[str, Tensor]],
    vae: tuple[VAEConfig, Mapping[str, Tensor]],
    text: tuple[dict[str, Any], Mapping[str, Tensor]],
    tokenizer: Path,
    prediction_type: str,
) -> None:
    """Writes the folder anew: (config, state) of each part, the tokenizer's files copied from `tokenizer`."""
    size = unet[0].sample_size * vae[0].factor
    shutil.rmtree(folder, ignore_errors=True)
    _write_json(folder / "model_index.json", _PIPELINE)
    _write_json(folder / "unet" / "config.json", unet_json(unet[0]))
    _write_json(folder / "vae" / "config.json", vae_json(vae[0], size))
    _write_json(folder / "text_encoder" / "config.json", text[0])
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json(prediction_type))
    shutil.copytree(tokenizer, folder / "tokenizer")
    _write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", unet[1])
    _write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", vae[1])
    _write_weights(folder / "text_encoder" / "model.safetensors", text[1])


def export_depth(
    folder: Path, base: Path, unet: tuple[UNetConfig, Mapping[str, Tensor]], depth_estimator: Any
) -> None:
    """Writes the folder anew for diffusers' depth pipeline: U-Net and DPT as given, all other parts `base`'s files."""
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    unwanted = ("safety_checker", "requires_safety_checker")
    index = {name: value for name, value in index.items() if name not in unwanted} | {
        "_class_name": "StableDiffusionDepth2ImgPipeline",
        "depth_estimator": ["transformers", "DPTForDepthEstimation"],
        "feature_extractor": ["transformers", "DPTImageProcessor"],
    }
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("unet"))
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "unet" / "config.json", unet_json(unet[0]))
    _write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", unet[1])
    config = {**depth_estimator.config.to_dict(), "architectures": ["DPTForDepthEstimation"], "dtype": "float16"}
    _write_json(folder / "depth_estimator" / "config.json", config)
    _write_weights(folder / "depth_estimator" / "model.safetensors", depth_estimator.state_dict())
    _write_json(folder / "feature_extractor" / "preprocessor_config.json", preprocessor_json(config["image_size"]))


def preprocessor_json(size: int) -> dict[str, Any]:
    """`feature_extractor/preprocessor_config.json`: squashed to the estimator's square, in [-1, 1]."""
    return {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "keep_aspect_ratio": False,
        "ensure_multiple_of": 1,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": False,
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    halves = {n: v.to(torch.float16) if v.is_floating_point() else v for n, v in state.items()}
    save_file({n: v.contiguous() for n, v in halves.items()}, str(path), metadata={"format": "pt"})
