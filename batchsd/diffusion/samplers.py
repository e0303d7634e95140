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
from collections.abc import Callable, Sequence
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


class Sampler(Protocol):
    """What a scheduler plugin writes."""

    def __call__(self, denoise: Denoise, x: State, levels: Levels, noise: Noise, **options: Any) -> State: ...


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


def dpmpp_multistep(
    denoise: Denoise,
    x: State,
    levels: Levels,
    noise: Noise,
    *,
    order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    eta: float = 1.0,
) -> State:
    """DPM-Solver++ multistep (Lu et al., 2022): an exponential integrator in x_0 over the log SNR.

    `order` 1 to 3. The first steps have less history and a lower order; the last is of order 1 if it ends
    clean or with `euler_at_final`, and with `lower_order_final` below 15 steps, the last but one of order 2.
    "sde-dpmsolver++" draws once a step: noise of strength `eta` in place of that share of the way (k-diffusion's
    2M SDE and 3M SDE).
    """
    churn = {"dpmsolver++": 0.0, "deis": 0.0, "sde-dpmsolver++": eta}.get(algorithm_type)
    if churn is None:
        raise UsageError(f"sampler.algorithm_type: {algorithm_type!r} is not built; use 'dpmsolver++'")
    past: list[tuple[float, State]] = []  # (log SNR, x_0) of each call so far
    for i, (here, there) in enumerate(levels):
        past.append((here.log_snr, denoise(x, here)))
        left = len(levels) - i
        few = lower_order_final and levels.total < 15
        if left == 1 and (euler_at_final or few or there.sigma == 0):
            now = 1
        elif left == 2 and few:
            now = min(order, 2)
        else:
            now = order
        kept = math.exp(-churn * (there.log_snr - here.log_snr)) if churn else 1.0
        estimate = taylor_sum(past[-now:], there.log_snr, solver_type, 1 + churn)
        x = kept * there.sigma / here.sigma * x + there.alpha * estimate
        if algorithm_type == "sde-dpmsolver++":
            x = x + there.sigma * math.sqrt(1 - kept**2) * noise()
    return x


def taylor_sum(past: Sequence[tuple[float, State]], end: float, solver_type: str, pull: float = 1.0) -> State:
    """The integral of pull e^(pull (lambda - end)) x_0(lambda) from the last call's log SNR to `end`.

    x_0 is taken as its Taylor polynomial with differences over `past`, one to three (log SNR, x_0), the
    last call last. At two, `solver_type` "midpoint" takes half the first weight for the exact second ("heun").
    """
    lam0, m0 = past[-1]
    h = end - lam0
    phi1 = -math.expm1(-pull * h)
    if len(past) == 1:
        return phi1 * m0
    lam1, m1 = past[-2]
    r0 = (lam0 - lam1) / h
    slope = (m0 - m1) / r0
    phi2 = 1 - phi1 / (pull * h)
    if len(past) == 2:
        if solver_type not in ("midpoint", "heun", "logrho", "bh1", "bh2"):
            raise UsageError(f"sampler.solver_type: {solver_type!r} is unknown; have midpoint, heun")
        return phi1 * m0 + (phi2 if solver_type == "heun" else phi1 / 2) * slope
    lam2, m2 = past[-3]
    r1 = (lam1 - lam2) / h
    bend = (slope - (m1 - m2) / r1) / (r0 + r1)
    phi3 = phi2 / (pull * h) - 0.5
    return phi1 * m0 + phi2 * (slope + r0 * bend) - phi3 * bend


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
