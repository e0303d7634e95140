"""The noise-prediction objective: destroy a latent by a random amount of noise, learn to undo it.

x_t = sqrt(ac_t) x_0 + sqrt(1 - ac_t) eps (Ho et al. 2020); the U-Net, told t and the caption, predicts eps, or
v = sqrt(ac_t) eps - sqrt(1 - ac_t) x_0 (Salimans & Ho 2022); squared error. One caption in ten is dropped, so that
the same network learns the unconditional prediction that classifier-free guidance needs (Ho & Salimans 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.model.text import TextEncoder
from batchsd.model.unet import UNet
from batchsd.training.loop import Loss


class Denoiser(nn.Module):
    """U-Net and text model, trained together."""

    def __init__(self, unet: UNet, text: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.text = text


@dataclass(frozen=True)
class Latents:
    """A data set seen through the encoder: posterior means and deviations, N C h w each, scaled."""

    means_NCHW: Tensor
    stds_NCHW: Tensor

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(self.means_NCHW[index].shape, generator=generator)
        return self.means_NCHW[index] + self.stds_NCHW[index] * noise


Beside = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents B C h w and the numbers of their pictures -> what the network is given: more channels, or not."""


def latents_alone(noisy_BCHW: Tensor, index: Tensor) -> Tensor:
    """A text model sees the noisy latents and nothing else."""
    return noisy_BCHW


def noise_prediction_loss(
    unet: UNet,
    text: TextEncoder,
    latents: Latents,
    captions: list[str],
    schedule: NoiseSchedule,
    batch_size: int,
    caption_dropout: float = 0.1,
    beside: Beside = latents_alone,
) -> Loss:
    """The loss of random batches, for `loop.train`. Prediction type as the schedule says."""
    ids_NT = text.ids(captions)
    empty_1T = text.ids([""])
    total = len(schedule.alphas_cumprod)

    def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        index = torch.randint(len(captions), (batch_size,), generator=generator)
        x0_BCHW = latents.draw(index, generator)
        noise_BCHW = torch.randn(x0_BCHW.shape, generator=generator)
        t_B = stratified_timesteps(batch_size, total, generator)
        drop_B = torch.rand(batch_size, generator=generator) < caption_dropout
        context_BTD = text(torch.where(drop_B[:, None], empty_1T, ids_NT[index]))
        given = beside(schedule.add_noise(x0_BCHW, noise_BCHW, t_B), index)
        predicted = unet(given, t_B, context_BTD)
        value = F.mse_loss(predicted, schedule.target(x0_BCHW, noise_BCHW, t_B))
        return value, {"loss": value.item()}

    return loss


def stratified_timesteps(batch_size: int, total: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `batch_size` equal parts of 0..total-1: uniform, and calmer than free draws."""
    way_B = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
    return (way_B * total).long().clamp(max=total - 1)


@torch.no_grad()
def widened(unet: UNet, extra: int) -> UNet:
    """The U-Net with `extra` more input channels, whose weights are zero: it still predicts what it did."""
    wide = UNet(replace(unet.config, in_channels=unet.config.in_channels + extra))
    state = dict(unet.state_dict())
    weight = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([weight, weight.new_zeros(len(weight), extra, *weight.shape[2:])], dim=1)
    wide.load_state_dict(state)
    return wide.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
