"""The shapes of a checkpoint, read from the `config.json` files of a diffusers-layout folder.

Only what Stable Diffusion 1.x, 2.x, XL and smaller models of that kind use is understood. A key that would change
the network and is not understood is refused by name: a picture drawn by half a network helps nobody.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchsd.types import UsageError

# Keys of diffusers' UNet2DConditionModel that change the network, and the only value that we draw with.
_UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False,
    "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_norm": None, "dual_cross_attention": False, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None, "num_class_embeds": None,
    "only_cross_attention": False, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default", "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None, "time_embedding_dim": None,
    "time_embedding_type": "positional", "timestep_post_act": None, "dropout": 0.0,
}  # fmt: skip
_VAE_FIXED: dict[str, Any] = {"act_fn": "silu"}
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net's shape, a value a level where it is a tuple; level 0 is the outermost.

    `heads` is what diffusers' configs call `attention_head_dim`: for SD it has always been the number of heads.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    heads: tuple[int, ...]
    context_dim: int
    groups: int = 32
    norm_eps: float = 1e-5
    linear_projection: bool = False
    upcast_attention: bool = False
    downsample_padding: int = 1
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    sample_size: int = 64
    # Transformer blocks in each attention of a level; the middle has the innermost level's. Empty: one everywhere.
    transformer_layers: tuple[int, ...] = ()
    # SDXL: numbers that a size or crop becomes, and the width of [pooled text, sizes and crops]; 0: it has none.
    added_time_dim: int = 0
    added_dim: int = 0
    # Distilled with the guidance as an input (LCM): numbers that the guidance becomes; 0: it has none.
    guidance_dim: int = 0

    def depth(self, level: int) -> int:
        """Transformer blocks in an attention of that level."""
        return self.transformer_layers[level] if self.transformer_layers else 1


@dataclass(frozen=True)
class VAEConfig:
    """The shape of an AutoencoderKL; `scaling_factor` brings its latents to unit variance."""

    in_channels: int
    out_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    layers: int
    groups: int = 32
    # 0.18215: 1 / std of SD v1 latents; old configs leave the key out and mean this.
    scaling_factor: float = 0.18215
    quant_conv: bool = True
    post_quant_conv: bool = True
    mid_attention: bool = True
    # SDXL's own decoder overflows float16 and gives black pictures.
    force_upcast: bool = False

    @property
    def factor(self) -> int:
        """Pixels a latent, along a side: one halving between neighbouring levels."""
        return int(2 ** (len(self.channels) - 1))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint, or a `UsageError` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: missing; a checkpoint folder in diffusers layout has one") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON object is expected, this is a {type(value).__name__}")
    return value


def _refuse_unknown(config: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for key, only in fixed.items():
        if config.get(key, only) not in (only, None):
            raise UsageError(f"{where}: {key} = {config[key]!r} is not supported (only {only!r})")


def _per_level(value: Any, levels: int, key: str, where: str) -> tuple[int, ...]:
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels or not all(isinstance(each, int) for each in values):
        raise UsageError(f"{where}: {key} has {len(values)} entries for {levels} levels: {value}")
    return values


def _attention_flags(names: Any, known: Mapping[str, bool], key: str, where: str) -> tuple[bool, ...]:
    for name in names:
        if name not in known:
            raise UsageError(f"{where}: {key} holds {name!r}; supported are {', '.join(known)}")
    return tuple(known[name] for name in names)


def unet_config(config: Mapping[str, Any], where: str = "unet/config.json") -> UNetConfig:
    """A `UNetConfig` from diffusers' keys; keys left out take that class's defaults.

    Raises `UsageError` for a network of another kind.
    """
    _refuse_unknown(config, _UNET_FIXED, where)
    channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    levels = len(channels)
    depths = _per_level(
        config.get("transformer_layers_per_block") or 1, levels, "transformer_layers_per_block", where
    )
    added = config.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise UsageError(f"{where}: addition_embed_type = {added!r} is not supported (only 'text_time', SDXL's)")
    down = config.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    up = config.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    return UNetConfig(
        in_channels=config.get("in_channels", 4),
        out_channels=config.get("out_channels", 4),
        channels=channels,
        layers=_per_level(config.get("layers_per_block", 2), levels, "layers_per_block", where),
        down_attention=_attention_flags(down, _DOWN, "down_block_types", where),
        up_attention=_attention_flags(up, _UP, "up_block_types", where),
        heads=_per_level(config.get("attention_head_dim", 8), levels, "attention_head_dim", where),
        context_dim=config.get("cross_attention_dim", 1280),
        groups=config.get("norm_num_groups", 32),
        norm_eps=config.get("norm_eps", 1e-5),
        linear_projection=bool(config.get("use_linear_projection", False)),
        upcast_attention=bool(config.get("upcast_attention", False)),
        downsample_padding=config.get("downsample_padding", 1),
        flip_sin_to_cos=config.get("flip_sin_to_cos", True),
        freq_shift=config.get("freq_shift", 0),
        sample_size=config.get("sample_size") or 64,
        transformer_layers=depths,
        added_time_dim=config["addition_time_embed_dim"] if added else 0,
        added_dim=config["projection_class_embeddings_input_dim"] if added else 0,
        guidance_dim=config.get("time_cond_proj_dim") or 0,
    )


def vae_config(config: Mapping[str, Any], where: str = "vae/config.json") -> VAEConfig:
    """A `VAEConfig` from diffusers' keys. Raises `UsageError` for an autoencoder of another kind."""
    _refuse_unknown(config, _VAE_FIXED, where)
    for key, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if any(name != only for name in config.get(key, (only,))):
            raise UsageError(f"{where}: {key} holds {config[key]}; only {only} is supported")
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise UsageError(f"{where}: {key} is not supported (Stable Diffusion 1.x, 2.x and XL have none)")
    return VAEConfig(
        in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3),
        latent_channels=config.get("latent_channels", 4),
        channels=tuple(config.get("block_out_channels", (64,))),
        layers=config.get("layers_per_block", 1),
        groups=config.get("norm_num_groups", 32),
        scaling_factor=config.get("scaling_factor", 0.18215),
        quant_conv=config.get("use_quant_conv", True),
        post_quant_conv=config.get("use_post_quant_conv", True),
        mid_attention=config.get("mid_block_add_attention", True),
        force_upcast=config.get("force_upcast", False),
    )
