"""A loaded checkpoint: text encoder, U-Net, VAE and what its scheduler config says, on one device.

    text -> states; (latents, timestep, states) -> prediction; latents <-> pictures
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from batchsd.model.config import read_json, unet_config, vae_config
from batchsd.model.text import TextEncoder, load_text_encoder
from batchsd.model.unet import UNet
from batchsd.model.vae import AutoencoderKL
from batchsd.model.weights import fill, modern_names, on_meta, read_safetensors
from batchsd.types import UsageError

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Model:
    """A Stable Diffusion checkpoint in memory. Latents are scaled (unit variance) wherever they are handed out."""

    unet: UNet
    vae: AutoencoderKL
    text: TextEncoder
    scheduler_config: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def extra_channels(self) -> int:
        """Input channels of the U-Net beside the noisy latents: 0 text, 1 depth, 4 edit, 5 inpainting."""
        return self.unet.config.in_channels - self.latent_channels

    @property
    def scale_factor(self) -> int:
        """Pixels a latent, along a side."""
        return self.vae.config.factor

    @property
    def native_size(self) -> int:
        """The side, in pixels, that the checkpoint was trained for."""
        return self.unet.config.sample_size * self.scale_factor

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> states (B, T, D)."""
        return self.text.encode(texts)

    @torch.no_grad()
    def encode_image(self, image_3HW: Tensor, generator: torch.Generator) -> Tensor:
        """A picture in [-1, 1] -> a draw of its posterior, scaled, float32 (C, H/f, W/f).

        The draw is one float32 tensor of (1, C, H/f, W/f) from the row's CPU generator, as diffusers' img2img
        makes it.
        """
        posterior = self.vae.encode(image_3HW[None].to(self.device, self.vae.dtype))
        noise = torch.randn(posterior.mean_BCHW.shape, generator=generator, dtype=torch.float32)
        drawn = posterior.sample(noise.to(posterior.mean_BCHW))
        return (drawn[0] * self.vae.config.scaling_factor).float().cpu()

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Scaled latents -> pictures in [0, 1], float32 (B, 3, H, W), on the device."""
        pictures = self.vae.decode((latents_BCHW / self.vae.config.scaling_factor).to(self.vae.dtype))
        return (pictures.float() / 2 + 0.5).clamp(0, 1)


def load(path: Path, dtype: str = "auto", device: str = "auto") -> Model:
    """Loads a diffusers-layout folder. Nothing is downloaded.

    `device` "auto" takes a GPU where there is one; `dtype` "auto" is float32 on a CPU (half types are many times
    slower there) and bfloat16 or float16 on a GPU. Raises `UsageError` naming file and tensor.
    """
    if not path.is_dir():
        raise UsageError(f"model.path: {path} is not a folder in diffusers layout (model_index.json, unet/, vae/, ...)")
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    unet_path, vae_path = path / "unet" / "config.json", path / "vae" / "config.json"
    unet = cast(UNet, on_meta(UNet, unet_config(read_json(unet_path), str(unet_path))))
    fill(unet, read_safetensors(path / "unet" / _WEIGHTS), str(path / "unet"))
    vae = cast(AutoencoderKL, on_meta(AutoencoderKL, vae_config(read_json(vae_path), str(vae_path))))
    fill(vae, modern_names(read_safetensors(path / "vae" / _WEIGHTS)), str(path / "vae"))
    for module in (unet, vae):
        place(module, where, kind)
    text = load_text_encoder(path, kind, where)
    if text.model.config.hidden_size != unet.config.context_dim:
        raise UsageError(
            f"{path}: the text encoder gives {text.model.config.hidden_size} numbers a token, the U-Net takes "
            f"{unet.config.context_dim}; these parts are not of one checkpoint"
        )
    return Model(unet, vae, text, read_json(path / "scheduler" / "scheduler_config.json"))


def place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a network to where it draws, one tensor at a time.

    Convolutions' weights lie channels last: 1.04-1.3 times as fast on a CPU, and what a GPU's tensor cores want.
    """
    module.eval().requires_grad_(False)
    for parameter in module.parameters():
        layout = torch.channels_last if parameter.ndim == 4 else torch.preserve_format
        parameter.data = parameter.data.to(device, dtype, memory_format=layout)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where torch sees one. Raises `UsageError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"model.device: {name!r} is unknown; auto, cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"model.device: {name!r}, but torch {torch.__version__} sees no GPU here")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name; "auto" as `load` says. Raises `UsageError`."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    full = _SHORT.get(name, name)
    if full not in _DTYPES:
        raise UsageError(f"model.dtype: {name!r} is unknown; auto, {', '.join(_DTYPES)}")
    return _DTYPES[full]
