"""The autoencoder: pictures <-> latents a factor smaller, after Kingma & Welling 2014 and Rombach et al. 2022.

encode: x -> mean, logvar of a diagonal Gaussian; a latent is scaling_factor * (mean + std * noise); decode goes
back. Parameters bear diffusers' names (AutoencoderKL). Shapes: B rows, C channels, H W size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchsd.model.config import VAEConfig
from batchsd.model.layers import Attention, Downsample2D, ResnetBlock2D, Upsample2D

_EPS = 1e-6  # of every norm in this autoencoder; the U-Net's resnets have 1e-5


class MidAttention(Attention):
    """Single-head attention over all pixels, on a GroupNorm, added back."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__(dim, dim, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, dim, eps=_EPS)

    def forward(
        self, x_BCHW: Tensor, context_BSD: Tensor | None = None, mask_BS: Tensor | None = None
    ) -> Tensor:
        h_BTC = self.group_norm(x_BCHW.flatten(2)).transpose(1, 2)
        return x_BCHW + super().forward(h_BTC, context_BSD, mask_BS).transpose(1, 2).unflatten(2, x_BCHW.shape[-2:])


class MidBlock(nn.Module):
    """The innermost part: resnet, attention (where the config has it), resnet."""

    def __init__(self, dim: int, config: VAEConfig) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([MidAttention(dim, config.groups)] if config.mid_attention else [])
        self.resnets = nn.ModuleList(_resnet(config, dim, dim) for _ in range(2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.resnets[0](x_BCHW)
        for attention in self.attentions:
            x_BCHW = attention(x_BCHW)
        return self.resnets[1](x_BCHW)


class Level(nn.Module):
    """Resnets at one size, then the step to the next size, where there is one."""

    def __init__(self, config: VAEConfig, c_in: int, c_out: int, layers: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(config, c_in if i == 0 else c_out, c_out) for i in range(layers))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for resnet in self.resnets:
            x_BCHW = resnet(x_BCHW)
        for resize in [*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())]:
            x_BCHW = resize(x_BCHW)
        return x_BCHW


class Encoder(nn.Module):
    """Pictures (B 3 H W) -> moments (B 2*latent H/f W/f)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        inputs = (channels[0], *channels[:-1])
        self.down_blocks = nn.ModuleList(
            Level(config, c_in, c_out, config.layers) for c_in, c_out in zip(inputs, channels, strict=True)
        )
        for block, dim in zip(self.down_blocks[:-1], channels, strict=False):
            block.downsamplers = nn.ModuleList([Downsample2D(dim, padding=0)])
        self.mid_block = MidBlock(channels[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for block in self.down_blocks:
            x_BCHW = block(x_BCHW)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x_BCHW))))


class Decoder(nn.Module):
    """Latents (B latent H/f W/f) -> pictures (B 3 H W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = tuple(reversed(config.channels))
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        inputs = (channels[0], *channels[:-1])
        self.up_blocks = nn.ModuleList(
            Level(config, c_in, c_out, config.layers + 1) for c_in, c_out in zip(inputs, channels, strict=True)
        )
        for block, dim in zip(self.up_blocks[:-1], channels, strict=False):
            block.upsamplers = nn.ModuleList([Upsample2D(dim)])
        self.mid_block = MidBlock(channels[0], config)
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid_block(self.conv_in(z_BCHW))
        for block in self.up_blocks:
            x_BCHW = block(x_BCHW)
        return self.conv_out(F.silu(self.conv_norm_out(x_BCHW)))


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian over (unscaled) latents that the encoder gives for a picture."""

    mean_BCHW: Tensor
    logvar_BCHW: Tensor

    def sample(self, noise_BCHW: Tensor) -> Tensor:
        return self.mean_BCHW + torch.exp(0.5 * self.logvar_BCHW) * noise_BCHW

    def kl(self) -> Tensor:
        """KL to the unit Gaussian, in nats, summed over a row's latents: (B,)."""
        terms = self.mean_BCHW.square() + self.logvar_BCHW.exp() - 1 - self.logvar_BCHW
        return 0.5 * terms.sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """The VAE of Stable Diffusion: `encode` to a posterior, `decode` back; neither applies scaling_factor."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments, latent = 2 * config.latent_channels, config.latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.post_quant_conv else None

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def encode(self, x_B3HW: Tensor) -> Posterior:
        """Pictures in [-1, 1], sides multiples of the factor -> posterior over B C H/f W/f."""
        moments = self.encoder(x_B3HW)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean_BCHW, logvar_BCHW = moments.chunk(2, dim=1)
        # The clamp keeps exp() finite; its bounds are LDM's.
        return Posterior(mean_BCHW, logvar_BCHW.clamp(-30.0, 20.0))

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Unscaled latents -> pictures, about [-1, 1], not clamped."""
        return self.decoder(z_BCHW if self.post_quant_conv is None else self.post_quant_conv(z_BCHW))


def _resnet(config: VAEConfig, c_in: int, c_out: int) -> ResnetBlock2D:
    return ResnetBlock2D(c_in, c_out, None, config.groups, _EPS)
