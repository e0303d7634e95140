"""The U-Net against diffusers' own, over the configs that Stable Diffusion 1.x and 2.x use, made small."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from batchsd.model.config import unet_config
from batchsd.model.unet import UNet
from batchsd.types import UsageError

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SD21 = {
    "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
    "upcast_attention": True, "sample_size": 96,
}  # fmt: skip


def small(**changes: Any) -> dict[str, Any]:
    return {
        "block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": 24, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **changes,
    }  # fmt: skip


CONFIGS = {
    "sd1: one head count, convolutions around attention": small(attention_head_dim=8),
    "sd2: heads a level, linear, upcast": small(
        attention_head_dim=[2, 4], use_linear_projection=True, upcast_attention=True
    ),
    "depth: five channels in": small(in_channels=5, attention_head_dim=4),
    "edit: eight channels in": small(in_channels=8, attention_head_dim=4),
    "inpaint: nine channels in": small(in_channels=9, attention_head_dim=4),
    "attention at every level, one layer": small(
        layers_per_block=1, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    ),
    "three levels, other epsilon, sin first": small(
        block_out_channels=(16, 32, 32), attention_head_dim=4, norm_eps=1e-6, flip_sin_to_cos=False, freq_shift=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
}  # fmt: skip


def compare(config: dict[str, Any], size: tuple[int, int], tokens: int = 9) -> float:
    """Largest difference to diffusers' U-Net, relative to its largest output, at two timesteps in one batch."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config).eval()
    ours = UNet(unet_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    shape = ours.config
    latents = torch.randn(2, shape.in_channels, *size)
    timesteps, context = torch.tensor([3, 801]), torch.randn(2, tokens, shape.context_dim)
    with torch.no_grad():
        expected = theirs(latents, timesteps, context).sample
        found = ours(latents, timesteps, context)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
def test_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    assert compare(CONFIGS[name], size) < 1e-4


def test_sizes_that_do_not_halve_evenly() -> None:
    assert compare(CONFIGS["three levels, other epsilon, sin first"], (9, 14)) < 1e-4


@pytest.mark.heavy
@pytest.mark.parametrize("config", [SD15, SD21], ids=["SD1.5", "SD2.1"])
def test_whole_size_equals_diffusers(config: dict[str, Any]) -> None:
    assert compare(config, (32, 32), tokens=77) < 1e-4


@pytest.mark.parametrize(
    ("config", "parameters"), [(SD15, 859_520_964), (SD21, 865_910_724), ({**SD21, "in_channels": 5}, 865_913_604)]
)
def test_real_sizes(config: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        unet = UNet(unet_config(config))
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert len(unet.state_dict()) == 686
    # LDM's count: conv_in and each downsampling one are blocks of their own, an upsampling one is part of another.
    down = sum(len(level.resnets) + len(getattr(level, "downsamplers", ())) for level in unet.down_blocks)
    assert (1 + down, sum(len(level.resnets) for level in unet.up_blocks)) == (12, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep' is not supported"),
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "down_block_types holds 'AttnDownBlock2D'"),
        ({"attention_head_dim": [8]}, "attention_head_dim has 1 entries for 2 levels"),
        ({"transformer_layers_per_block": [[1], [2]]}, "transformer_layers_per_block has 2 entries"),
        ({"addition_embed_type": "image"}, "addition_embed_type = 'image' is not supported"),
    ],
)
def test_networks_of_another_kind_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match="unet/config.json: ") as error:
        unet_config({**small(), **change})
    assert message in str(error.value)
