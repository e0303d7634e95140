"""The autoencoder against diffusers' own, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from batchsd.model.config import vae_config
from batchsd.model.vae import AutoencoderKL, Posterior
from batchsd.types import UsageError

SD = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "scaling_factor": 0.18215}


def small(**changes: Any) -> dict[str, Any]:
    return {"block_out_channels": (16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, **changes}


CONFIGS = {
    "as SD": small(layers_per_block=2),
    "other latents": small(latent_channels=8, block_out_channels=(16, 32)),
    "without quantiser and attention": small(
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False
    ),
}


def compare(config: dict[str, Any], size: tuple[int, int]) -> tuple[float, float, float]:
    """Largest relative differences of mean, log variance and decoded picture."""
    from diffusers import AutoencoderKL as Theirs

    torch.manual_seed(0)
    levels = len(config["block_out_channels"])
    theirs = Theirs(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **config
    ).eval()
    ours = AutoencoderKL(vae_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    picture = torch.rand(2, 3, *size) * 2 - 1
    latent = torch.randn(2, ours.config.latent_channels, *(side // ours.config.factor for side in size))
    with torch.no_grad():
        expected = theirs.encode(picture).latent_dist
        found = ours.encode(picture)
        pairs = [
            (found.mean_BCHW, expected.mean),
            (found.logvar_BCHW, expected.logvar),
            (ours.decode(latent), theirs.decode(latent).sample),
        ]
    mean, logvar, decoded = (float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return mean, logvar, decoded


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    assert max(compare(CONFIGS[name], size)) < 1e-4


@pytest.mark.heavy
def test_whole_size_equals_diffusers() -> None:
    assert max(compare(SD, (128, 128))) < 1e-4


def test_real_size() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(vae_config(SD))
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert len(vae.state_dict()) == 248
    assert vae.config.factor == 8


def test_old_configs_mean_sd1s_scaling() -> None:
    assert vae_config({}).scaling_factor == 0.18215


def test_posterior() -> None:
    generator = torch.Generator().manual_seed(0)
    posterior = Posterior(torch.full((1, 4, 50, 50), 2.0), torch.full((1, 4, 50, 50), -1.0))
    drawn = posterior.sample(torch.randn(1, 4, 50, 50, generator=generator))
    assert drawn.mean() == pytest.approx(2.0, abs=0.02)
    assert drawn.var() == pytest.approx(torch.exp(torch.tensor(-1.0)).item(), abs=0.02)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(2.0, torch.exp(torch.tensor(-0.5))), torch.distributions.Normal(0.0, 1.0)
    )
    assert posterior.kl().item() == pytest.approx(expected.item() * 10_000, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift_factor": 0.1}, "shift_factor is not supported"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "only DownEncoderBlock2D is supported"),
    ],
)
def test_autoencoders_of_another_kind_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vae_config({**small(), **change})
