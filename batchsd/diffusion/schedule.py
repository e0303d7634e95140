"""The forward process destroys a latent by steps of Gaussian noise:

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2),   alpha_t^2 = ac_t = prod_{s<=t} (1 - beta_s) = 1 - sigma_t^2

A network learns to undo it. Told x_t it predicts eps, v = alpha_t eps - sigma_t x_0, or x_0 itself
("epsilon", "v_prediction", "sample"); each is a linear function of the other two and x_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from batchsd.types import UsageError

if TYPE_CHECKING:  # slow to import, and a plan needs no more than the names of samplers
    import torch

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

CLAMPED_ALPHA = 2.0**-24
"""alphas_cumprod[-1] of a zero-terminal-SNR schedule where sigma / alpha must stay finite (sigma 4096)."""


def scaled_linear(start: float, end: float, count: int) -> torch.Tensor:
    """Linear in sqrt(beta): what latent diffusion calls "linear". float32 [count]."""
    import torch

    return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2


def linear(start: float, end: float, count: int) -> torch.Tensor:
    """Linear in beta (Ho et al., 2020). float32 [count]."""
    import torch

    return torch.linspace(start, end, count, dtype=torch.float32)


def squaredcos_cap_v2(_start: float, _end: float, count: int) -> torch.Tensor:
    """ac(t) = cos^2((t + 0.008) / 1.008 * pi / 2), beta <= 0.999 (Nichol and Dhariwal, 2021). [count]."""
    import torch

    def ac(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - ac((i + 1) / count) / ac(i / count), 0.999) for i in range(count)])


BETAS: Mapping[str, Callable[[float, float, int], torch.Tensor]] = {
    "scaled_linear": scaled_linear,
    "linear": linear,
    "squaredcos_cap_v2": squaredcos_cap_v2,
}


def rescale_zero_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(ac) so that the last is 0 and the first stays (Lin et al., 2023, algorithm 1)."""
    import torch

    root = torch.cumprod(1 - betas, 0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    ac = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([ac[:1], ac[1:] / ac[:-1]])


def clean_coefficients(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(c_skip, c_out) with x_0 = c_skip * x + c_out * output, for x = alpha x_0 + sigma eps.

    The network itself sees x / r, r = hypot(alpha, sigma), so its v belongs to (alpha / r, sigma / r).
    Raises UsageError for eps at alpha = 0, where x holds nothing of x_0.
    """
    if prediction_type == "sample":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        r = math.hypot(alpha, sigma)
        return alpha / r**2, -sigma / r
    if alpha == 0:
        raise UsageError(
            "scheduler: zero terminal SNR with prediction_type 'epsilon' leaves no way to a clean picture; "
            "use a checkpoint with 'v_prediction', or spacing 'leading'"
        )
    return 1 / alpha, -sigma / alpha


def noise_coefficients(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(c_skip, c_out) with eps = c_skip * x + c_out * output, for x = alpha x_0 + sigma eps."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        r = math.hypot(alpha, sigma)
        return sigma / r**2, alpha / r
    return 1 / sigma, -alpha / sigma


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A checkpoint's forward process.

    `alphas_cumprod`: float64 [T], decreasing, the last exactly 0 for zero terminal SNR. `config` is the
    `scheduler_config.json` that it came from: a named scheduler reads its other settings there.
    """

    alphas_cumprod: np.ndarray
    prediction_type: str = "epsilon"
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read betas, prediction type and zero SNR from a `scheduler_config.json`.

        Absent keys mean diffusers' defaults. Products are taken in float32, as the networks were trained and
        as diffusers has it, so that both agree to the last bit. Raises UsageError on what we do not know.
        """
        import torch

        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTION_TYPES:
            raise UsageError(
                f"scheduler_config.json: prediction_type: {prediction!r} is unknown; "
                f"have {', '.join(PREDICTION_TYPES)}"
            )
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
        else:
            name = config.get("beta_schedule", "linear")
            if name not in BETAS:
                raise UsageError(
                    f"scheduler_config.json: beta_schedule: {name!r} is unknown; have {', '.join(BETAS)}"
                )
            start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
            betas = BETAS[name](start, end, config.get("num_train_timesteps", 1000))
        if config.get("rescale_betas_zero_snr"):
            betas = rescale_zero_snr(betas)
        return cls(torch.cumprod(1 - betas, 0).double().numpy(), prediction, dict(config))

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """sigma_t / alpha_t, k-diffusion's sigma: float64 [T], increasing, finite (see CLAMPED_ALPHA)."""
        ac = np.maximum(self.alphas_cumprod, CLAMPED_ALPHA) if self.zero_snr else self.alphas_cumprod
        return np.sqrt((1 - ac) / ac)

    @property
    def zero_snr(self) -> bool:
        """Whether the last timestep is noise alone."""
        return self.alphas_cumprod[-1] == 0

    def timestep_of(self, sigma: float) -> float:
        """The timestep, between the training ones, at k-diffusion's sigma: linear in log sigma, clipped."""
        return float(np.interp(math.log(max(sigma, 1e-10)), np.log(self.sigmas), np.arange(len(self))))

    def coefficients(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha_t, sigma_t) of timesteps t [R], to multiply `like` [R, ...]: its dtype and device."""
        import torch

        ac = torch.from_numpy(self.alphas_cumprod).to(t.device)[t].reshape(-1, *[1] * (like.ndim - 1))
        return ac.sqrt().to(like), (1 - ac).sqrt().to(like)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """A draw of q(x_t | x_0): alpha_t x_0 + sigma_t noise. x0, noise [R, ...]; t int64 [R]."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * noise

    def velocity(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """v_t = alpha_t noise - sigma_t x_0 (Salimans and Ho, 2022)."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * noise - sigma * x0

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network is to predict for x_t, by the schedule's prediction type."""
        if self.prediction_type == "v_prediction":
            return self.velocity(x0, noise, t)
        return noise if self.prediction_type == "epsilon" else x0
