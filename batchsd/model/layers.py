"""The parts that U-Net and VAE are built from; parameters bear diffusers' names.

Shapes: B rows, C channels, H W latent or pixel size, T tokens, D width, E time-embedding width, N heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResnetBlock2D(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), He et al.'s block as DDPM (Ho et al. 2020) uses it."""

    def __init__(self, c_in: int, c_out: int, time_dim: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x_BCHW: Tensor, time_BE: Tensor | None = None) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        if time_BE is not None:
            h_BCHW = h_BCHW + self.time_emb_proj(F.silu(time_BE))[:, :, None, None]
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return h_BCHW + (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))


class Attention(nn.Module):
    """Multi-head attention of x to a context (to itself where none is given): softmax(q k^T / sqrt(d)) v."""

    def __init__(self, dim: int, context_dim: int, heads: int, *, bias: bool = False, upcast: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim, dim, bias=bias)
        # A list of one, because diffusers' second entry is a dropout: the name is `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(
        self, x_BTD: Tensor, context_BSD: Tensor | None = None, mask_BS: Tensor | None = None
    ) -> Tensor:
        """`mask_BS` is False where a context has no token, True where it has; None: everywhere."""
        context_BSD = x_BTD if context_BSD is None else context_BSD
        q_BNTd = self._split(self.to_q(x_BTD))
        k_BNSd = self._split(self.to_k(context_BSD))
        v_BNSd = self._split(self.to_v(context_BSD))
        if self.upcast:  # SD 2.1 overflows fp16 in q k^T
            q_BNTd, k_BNSd, v_BNSd = q_BNTd.float(), k_BNSd.float(), v_BNSd.float()
        mask_B11S = None if mask_BS is None else mask_BS[:, None, None, :]
        h_BNTd = F.scaled_dot_product_attention(q_BNTd, k_BNSd, v_BNSd, attn_mask=mask_B11S)
        return self.to_out[0](h_BNTd.transpose(1, 2).flatten(2).to(x_BTD.dtype))

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(2, (self.heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """h * gelu(gate), the gate being the second half (Shazeer 2020); the exact erf form of GELU."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTD, gate_BTD = self.proj(x_BTD).chunk(2, dim=-1)
        return h_BTD * F.gelu(gate_BTD)


class FeedForward(nn.Module):
    """Two layers with a GEGLU between, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The Identity stands where diffusers has a dropout, so that the last layer is `net.2`.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.net(x_BTD)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each on a LayerNorm, each added back."""

    def __init__(self, dim: int, context_dim: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads, upcast=upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x_BTD: Tensor, context_BSD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.attn1(self.norm1(x_BTD))
        x_BTD = x_BTD + self.attn2(self.norm2(x_BTD), context_BSD, mask_BS)
        return x_BTD + self.ff(self.norm3(x_BTD))


class Transformer2DModel(nn.Module):
    """The spatial transformer of Rombach et al. 2022: pixels as tokens, then back, added to the input."""

    def __init__(
        self, dim: int, context_dim: int, heads: int, groups: int, linear: bool, upcast: bool, depth: int = 1
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in: nn.Module = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(dim, context_dim, heads, upcast) for _ in range(depth)
        )
        self.proj_out: nn.Module = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)

    def forward(self, x_BCHW: Tensor, context_BSD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        h = self.norm(x_BCHW)
        h_BTD = self.proj_in(_tokens(h)) if self.linear else _tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h_BTD = block(h_BTD, context_BSD, mask_BS)
        size = x_BCHW.shape[-2:]
        h = _pixels(self.proj_out(h_BTD), size) if self.linear else self.proj_out(_pixels(h_BTD, size))
        return h + x_BCHW


def _tokens(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.flatten(2).transpose(1, 2)


def _pixels(x_BTD: Tensor, size: torch.Size) -> Tensor:
    return x_BTD.transpose(1, 2).unflatten(2, tuple(size))


class Downsample2D(nn.Module):
    """A convolution of stride 2. Padding 0 means one row and column at the far edges, as the VAE has it."""

    def __init__(self, dim: int, padding: int) -> None:
        super().__init__()
        self.far_edges_only = padding == 0
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=padding)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)) if self.far_edges_only else x_BCHW)


class Upsample2D(nn.Module):
    """Nearest neighbour to the given size (twice the input's, unless that was odd), then a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x_BCHW: Tensor, size: torch.Size | None = None) -> Tensor:
        size = torch.Size(2 * n for n in x_BCHW.shape[-2:]) if size is None else size
        return self.conv(F.interpolate(x_BCHW, size=size, mode="nearest"))


class TimestepEmbedding(nn.Module):
    """Two layers over the sinusoids of the timestep, to which a distilled model adds its guidance: B -> B E."""

    def __init__(self, dim: int, time_dim: int, guidance_dim: int = 0) -> None:
        super().__init__()
        if guidance_dim:
            self.cond_proj = nn.Linear(guidance_dim, dim, bias=False)
        self.linear_1 = nn.Linear(dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, x_BD: Tensor, guidance_BG: Tensor | None = None) -> Tensor:
        if guidance_BG is not None:
            x_BD = x_BD + self.cond_proj(guidance_BG)
        return self.linear_2(F.silu(self.linear_1(x_BD)))


def sinusoids(timesteps_B: Tensor, dim: int, *, cos_first: bool, freq_shift: float) -> Tensor:
    """cos and sin of t / 10000^(i / (dim/2 - freq_shift)), B -> B dim, float32 (Vaswani et al. 2017)."""
    half = dim // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps_B.device)
    angles = timesteps_B[:, None].float() * torch.exp(exponent / (half - freq_shift))[None, :]
    parts = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)
