"""Samplers as their authors write them: a walk of x down the levels, e.g. Euler's

    x <- x + (x - D(x, s)) / s * (t - s)

`sampler(denoise, x, levels, noise, **options) -> x`, where `denoise(x, level)` is the clean estimate x_0 and
`denoise.eps(x, level)` the noise estimate (one network call each), `levels` gives (start, end) of each step,
and `noise()` draws from the row's generator, in diffusers' order. They never look inside x: `program` runs
them once on symbols. An option is a keyword parameter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

from batchsd.diffusion.levels import Level, Levels
from batchsd.types import UsageError

State = Any
"""A latent, or the symbol that stands for it: + and - with its kind, * and / by numbers."""


class Denoise(Protocol):
    """The network, guided, at one level."""

    def __call__(self, x: State, level: Level) -> State:
        """The clean estimate x_0."""
        ...

    def eps(self, x: State, level: Level) -> State:
        """The noise estimate: (x - alpha x_0) / sigma."""
        ...


Noise = Callable[[], State]


Sampler = Callable[..., State]
"""What a scheduler plugin writes: (denoise, x, levels, noise, *, options with defaults) -> x."""


def ddim(denoise: Denoise, x: State, levels: Levels, noise: Noise, *, eta: float = 0.0) -> State:
    """Song et al., 2020, eq. 12 and 16; eta 0 is deterministic, eta 1 is DDPM. One draw a step if eta > 0."""
    for here, there in levels:
        x0 = denoise(x, here)
        eps = (x - here.alpha * x0) / here.sigma
        std = eta * there.sigma / here.sigma * math.sqrt(max(0.0, 1 - (here.alpha / there.alpha) ** 2))
        x = there.alpha * x0 + math.sqrt(max(0.0, there.sigma**2 - std**2)) * eps
        if eta > 0:
            x = x + std * noise()
    return x


def euler(denoise: Denoise, x: State, levels: Levels, noise: Noise) -> State:
    """Karras et al., 2022, algorithm 1 without its second stage and without churn."""
    for here, there in levels:
        x = x + (there.sigma - here.sigma) * denoise.eps(x, here)
    return x


def ancestral_split(start: float, end: float, eta: float = 1.0) -> tuple[float, float]:
    """(down, up): step from sigma `start` down to `down`, then add noise of `up` to be at `end`."""
    up = min(end, eta * math.sqrt(end**2 * (start**2 - end**2) / start**2))
    return math.sqrt(end**2 - up**2), up


def euler_ancestral(denoise: Denoise, x: State, levels: Levels, noise: Noise, *, eta: float = 1.0) -> State:
    """k-diffusion's Euler a. One draw a step, the last one's too, though it is added at strength 0."""
    for here, there in levels:
        down, up = ancestral_split(here.sigma, there.sigma, eta)
        x = x + (down - here.sigma) * denoise.eps(x, here) + up * noise()
    return x


def ddpm(
    denoise: Denoise, x: State, levels: Levels, noise: Noise, *, variance_type: str = "fixed_small"
) -> State:
    """Ho et al., 2020, eq. 7: the posterior of the step before. One draw a step, none at timestep 0."""
    if variance_type not in ("fixed_small", "fixed_large"):
        raise UsageError(
            f"sampler.variance_type: {variance_type!r} is unknown; have fixed_small, fixed_large"
        )
    for here, there in levels:
        x0 = denoise(x, here)
        kept = (here.alpha / there.alpha) ** 2
        share = (there.sigma / here.sigma) ** 2
        x = there.alpha * (1 - kept) / here.sigma**2 * x0 + math.sqrt(kept) * share * x
        if here.timestep > 0:
            variance = (1 - kept) * (share if variance_type == "fixed_small" else 1.0)
            x = x + math.sqrt(variance) * noise()
    return x


def lcm(denoise: Denoise, x: State, levels: Levels, noise: Noise, *, timestep_scaling: float = 10.0) -> State:
    """Latent consistency (Luo et al., 2023): to x_0, then noised again. One draw a step but the last."""
    for i, (here, there) in enumerate(levels):
        x0 = denoise(x, here)
        scaled = here.timestep * timestep_scaling / 0.5  # 0.5: the sigma_data of its boundary condition
        clean = scaled / math.hypot(scaled, 1) * x0 + 1 / (scaled**2 + 1) * x
        x = clean if i == len(levels) - 1 else there.alpha * clean + there.sigma * noise()
    return x


def tcd(denoise: Denoise, x: State, levels: Levels, noise: Noise, *, eta: float = 0.3) -> State:
    """Trajectory consistency (Zheng et al., 2024): past the target to (1 - eta) of its timestep, then noised
    up to it. One draw a step but the last, if eta > 0.
    """
    for i, (here, there) in enumerate(levels):
        beyond = levels.trained(math.floor((1 - eta) * there.timestep))
        x0 = denoise(x, here)
        x = beyond.alpha * x0 + beyond.sigma / here.sigma * (x - here.alpha * x0)
        if eta > 0 and i < len(levels) - 1:
            kept = there.alpha / beyond.alpha
            x = kept * x + math.sqrt(max(0.0, 1 - kept**2)) * noise()
    return x


def from_k_diffusion(function: Callable[..., State]) -> Sampler:
    """Take a sampler of k-diffusion's manner: `function(denoise, x, sigmas, noise, **options) -> x`.

    There `denoise(x, sigma)` is the clean estimate, and `noise(sigma, sigma_next)` a draw. The levels must be
    VE (`levels.on_sigmas`).
    """

    @functools.wraps(function)
    def sampler(denoise: Denoise, x: State, levels: Levels, noise: Noise, **options: Any) -> State:
        known = {level.sigma: level for level in (*levels.starts, *levels.ends)}

        def at(x: State, sigma: float) -> State:
            return denoise(x, known[sigma] if sigma in known else levels.at(sigma))

        sigmas = [level.sigma for level in levels.starts] + [levels.ends[-1].sigma]
        return function(at, x, sigmas, lambda *_: noise(), **options)

    return sampler
