"""The autoencoder's objective: give the picture back through a narrow, nearly Gaussian middle.

loss = weighted |x' - x| + 2 (x' - x)^2 + 0.5 |dx' - dx| + 2e-4 KL, with d the differences between neighbouring
pixels: L1 keeps colours, the edge term keeps outlines that squared error alone would blur. Pixels near an object
weigh more where the data has masks: backgrounds are most of a picture and soon learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from batchsd.model.vae import AutoencoderKL
from batchsd.training.data import Pictures
from batchsd.training.loop import Loss

_OBJECT_WEIGHT = 4.0
_SQUARED, _EDGES, _KL = 2.0, 0.5, 2e-4


def reconstruction_loss(vae: AutoencoderKL, pictures: Pictures, batch_size: int) -> Loss:
    """The loss of random batches of `pictures`, for `loop.train`."""

    def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        index = torch.randint(len(pictures), (batch_size,), generator=generator)
        x_B3HW = pictures.floats(index).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x_B3HW)
        noise = torch.randn(posterior.mean_BCHW.shape, generator=generator)
        error_B3HW = vae.decode(posterior.sample(noise)) - x_B3HW
        weight = 1.0 if pictures.masks_N1HW is None else _near_objects(pictures.masks_N1HW[index])
        edges = error_B3HW.diff(dim=2).abs().mean() + error_B3HW.diff(dim=3).abs().mean()
        kl = posterior.kl().mean() / posterior.mean_BCHW[0].numel()
        squared = (weight * error_B3HW.square()).mean()
        value = (weight * error_B3HW.abs()).mean() + _SQUARED * squared + _EDGES * edges + _KL * kl
        # Peak to peak is 2 in [-1, 1], hence the 4.
        psnr = 10 * torch.log10(4 / error_B3HW.detach().square().mean())
        return value, {"loss": value.item(), "psnr": psnr.item()}

    return loss


def _near_objects(masks_B1HW: Tensor) -> Tensor:
    """1 far from objects, `_OBJECT_WEIGHT` on them and within two pixels of them, where the outlines lie."""
    grown = F.max_pool2d((masks_B1HW > 0).float(), 5, stride=1, padding=2)
    return 1 + (_OBJECT_WEIGHT - 1) * grown


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Pictures, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of every picture's posterior, N C h w each, unscaled."""
    parts = []
    for begin in range(0, len(pictures), batch_size):
        index = torch.arange(begin, min(begin + batch_size, len(pictures)))
        posterior = vae.encode(pictures.floats(index))
        parts.append((posterior.mean_BCHW, torch.exp(0.5 * posterior.logvar_BCHW)))
    means, deviations = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(deviations)


def encoded(file: Path, vae: AutoencoderKL, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Every picture's posterior (see `encode_all`), kept in `file`: encoding takes minutes."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(encode_all(vae, pictures), file)
    means, stds = torch.load(file, weights_only=True)
    return means, stds


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, means_NCHW: Tensor) -> None:
    """Folds each latent channel's mean and deviation into quant_conv and post_quant_conv, in place.

    Afterwards latents have mean 0 and deviation 1 a channel, so that scaling_factor is 1 and every channel meets
    the noise on equal terms. Pictures stay the same.
    """
    assert vae.quant_conv is not None and vae.post_quant_conv is not None
    mean_C = means_NCHW.mean(dim=(0, 2, 3))
    std_C = means_NCHW.std(dim=(0, 2, 3))
    latent = len(mean_C)
    inward, outward = vae.quant_conv, vae.post_quant_conv
    assert inward.bias is not None and outward.bias is not None
    inward.weight[:latent] /= std_C[:, None, None, None]
    inward.bias[:latent] = (inward.bias[:latent] - mean_C) / std_C
    inward.bias[latent:] -= 2 * std_C.log()  # logvar of z / std
    outward.bias += outward.weight[:, :, 0, 0] @ mean_C
    outward.weight *= std_C[None, :, None, None]
    vae.config = replace(vae.config, scaling_factor=1.0)
