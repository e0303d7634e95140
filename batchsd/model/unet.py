"""The U-Net: (noisy latents, timestep, text) -> prediction, with diffusers' parameter names.

Down the levels, a middle, up again; each block on the way up first takes the matching block's output from the
way down as a skip (Ronneberger et al. 2015; Rombach et al. 2022). SD1.5: 12 blocks down, 1, 12 up.
Shapes: B rows, C channels, H W latent size, T tokens, D context width, E time-embedding width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchsd.model.config import UNetConfig
from batchsd.model.layers import (
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    sinusoids,
)

Context = tuple[Tensor, Tensor | None]
"""Text states (B, T, D), and which of their tokens are there (B, T); None: all are."""


class DownBlock(nn.Module):
    """One level on the way down: (resnet, attention) pairs, then half the size."""

    def __init__(self, config: UNetConfig, level: int, c_in: int) -> None:
        super().__init__()
        c_out, layers = config.channels[level], config.layers[level]
        self.resnets = nn.ModuleList(_resnet(config, c_in if i == 0 else c_out, c_out) for i in range(layers))
        if config.down_attention[level]:
            self.attentions = nn.ModuleList(_transformer(config, level) for _ in range(layers))
        if level < len(config.channels) - 1:
            self.downsamplers = nn.ModuleList([Downsample2D(c_out, config.downsample_padding)])

    def forward(self, x_BCHW: Tensor, time_BE: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x_BCHW = resnet(x_BCHW, time_BE)
            if hasattr(self, "attentions"):
                x_BCHW = self.attentions[i](x_BCHW, *context)
            skips.append(x_BCHW)
        if hasattr(self, "downsamplers"):
            x_BCHW = self.downsamplers[0](x_BCHW)
            skips.append(x_BCHW)
        return x_BCHW, skips


class MidBlock(nn.Module):
    """The innermost level: resnet, attention, resnet."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        dim = config.channels[-1]
        self.attentions = nn.ModuleList([_transformer(config, len(config.channels) - 1)])
        self.resnets = nn.ModuleList(_resnet(config, dim, dim) for _ in range(2))

    def forward(self, x_BCHW: Tensor, time_BE: Tensor, context: Context) -> Tensor:
        x_BCHW = self.resnets[0](x_BCHW, time_BE)
        return self.resnets[1](self.attentions[0](x_BCHW, *context), time_BE)


class UpBlock(nn.Module):
    """One level on the way up: a skip joins before each resnet, then twice the size."""

    def __init__(self, config: UNetConfig, level: int, c_in: int, attention: bool) -> None:
        super().__init__()
        c_out, layers = config.channels[level], config.layers[level] + 1
        outer = config.channels[max(level - 1, 0)]  # the last skip of a level comes from the level outside it
        self.resnets = nn.ModuleList(
            _resnet(config, (c_in if i == 0 else c_out) + (outer if i == layers - 1 else c_out), c_out)
            for i in range(layers)
        )
        if attention:
            self.attentions = nn.ModuleList(_transformer(config, level) for _ in range(layers))
        if level > 0:
            self.upsamplers = nn.ModuleList([Upsample2D(c_out)])

    def forward(self, x_BCHW: Tensor, skips: list[Tensor], time_BE: Tensor, context: Context) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x_BCHW = resnet(torch.cat([x_BCHW, skips.pop()], dim=1), time_BE)
            if hasattr(self, "attentions"):
                x_BCHW = self.attentions[i](x_BCHW, *context)
        if hasattr(self, "upsamplers"):
            x_BCHW = self.upsamplers[0](x_BCHW, skips[-1].shape[-2:])
        return x_BCHW


class UNet(nn.Module):
    """The conditional U-Net of Stable Diffusion 1.x, 2.x and XL, and of smaller models of that kind."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        time_dim = 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim, config.guidance_dim)
        if config.added_dim:
            self.add_embedding = TimestepEmbedding(config.added_dim, time_dim)
        inputs = (channels[0], *channels[:-1])
        self.down_blocks = nn.ModuleList(DownBlock(config, i, c_in) for i, c_in in enumerate(inputs))
        self.mid_block = MidBlock(config)
        levels = list(reversed(range(len(channels))))
        self.up_blocks = nn.ModuleList(
            UpBlock(config, level, channels[min(level + 1, len(channels) - 1)], attention)
            for level, attention in zip(levels, config.up_attention, strict=True)
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(
        self,
        x_BCHW: Tensor,
        timesteps_B: Tensor,
        context_BTD: Tensor,
        mask_BT: Tensor | None = None,
        added: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Latents (B, in_channels, H, W), a timestep a row (B,), text states (B, T, D) -> (B, out_channels, H, W).

        `mask_BT`, where texts differ in length, is False where a row has no token; no row may lack them all.
        `added` bears diffusers' names: SDXL needs `text_embeds` (B, P) and `time_ids` (B, 6), see `Model.time_ids`;
        a model distilled with its guidance needs `timestep_cond` (B, guidance_dim). What is predicted (noise,
        velocity or the clean latents) is the checkpoint's own convention.
        """
        context, added = (context_BTD, mask_BT), added or {}
        time_BE = self._embedded_time(timesteps_B, added, x_BCHW.dtype)
        x_BCHW = self.conv_in(x_BCHW)
        skips = [x_BCHW]
        for down in self.down_blocks:
            x_BCHW, more = down(x_BCHW, time_BE, context)
            skips += more
        x_BCHW = self.mid_block(x_BCHW, time_BE, context)
        for up in self.up_blocks:
            x_BCHW = up(x_BCHW, skips, time_BE, context)
        return self.conv_out(F.silu(self.conv_norm_out(x_BCHW)))

    def _embedded_time(self, timesteps_B: Tensor, added: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """What every resnet is told beside the picture: (B, E)."""
        time_BD = self._sinusoids(timesteps_B, self.config.channels[0]).to(dtype)
        guidance_BG = added["timestep_cond"].to(dtype) if self.config.guidance_dim else None
        time_BE = self.time_embedding(time_BD, guidance_BG)
        if not self.config.added_dim:
            return time_BE
        sizes_BS = self._sinusoids(added["time_ids"].flatten(), self.config.added_time_dim)
        told_BA = torch.cat([added["text_embeds"].to(dtype), sizes_BS.reshape(len(time_BE), -1).to(dtype)], dim=1)
        return time_BE + self.add_embedding(told_BA)

    def _sinusoids(self, values_N: Tensor, dim: int) -> Tensor:
        config = self.config
        return sinusoids(values_N, dim, cos_first=config.flip_sin_to_cos, freq_shift=config.freq_shift)


def _resnet(config: UNetConfig, c_in: int, c_out: int) -> ResnetBlock2D:
    return ResnetBlock2D(c_in, c_out, 4 * config.channels[0], config.groups, config.norm_eps)


def _transformer(config: UNetConfig, level: int) -> Transformer2DModel:
    return Transformer2DModel(
        config.channels[level], config.context_dim, config.heads[level], config.groups,
        linear=config.linear_projection, upcast=config.upcast_attention, depth=config.depth(level),
    )  # fmt: skip
