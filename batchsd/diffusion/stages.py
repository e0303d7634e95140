"""Samplers with two network calls a step: the second looks at a point between, or at the end, and decides.

    Heun:  x + (d(x, s) + d(x', t)) / 2 * (t - s),   x' = x + d(x, s) (t - s),   d = eps

All walk VE levels (k-diffusion's), but `dpmpp_singlestep`, which spends one call a grid point.
"""

from __future__ import annotations

import math

from batchsd.diffusion.levels import Level, Levels
from batchsd.diffusion.samplers import Denoise, Noise, State, ancestral_split
from batchsd.types import UsageError


def heun(denoise: Denoise, x: State, levels: Levels, noise: Noise) -> State:
    """Karras et al., 2022, algorithm 1 without churn; the step to 0 is Euler's."""
    for here, there in levels:
        step = there.sigma - here.sigma
        d = denoise.eps(x, here)
        if there.sigma > 0:
            d = (d + denoise.eps(x + step * d, there)) / 2
        x = x + step * d
    return x


def dpm2(denoise: Denoise, x: State, levels: Levels, noise: Noise) -> State:
    """k-diffusion's DPM2 (after DPM-Solver-2): the slope at the geometric mean; the step to 0 is Euler's."""
    for here, there in levels:
        d = denoise.eps(x, here)
        if there.sigma > 0:
            middle = levels.at(math.sqrt(here.sigma * there.sigma))
            d = denoise.eps(x + (middle.sigma - here.sigma) * d, middle)
        x = x + (there.sigma - here.sigma) * d
    return x


def dpm2_ancestral(denoise: Denoise, x: State, levels: Levels, noise: Noise, *, eta: float = 1.0) -> State:
    """k-diffusion's DPM2 a: DPM2 to a lower sigma, then noise up. One draw a step, none in the step to 0."""
    for here, there in levels:
        down, up = ancestral_split(here.sigma, there.sigma, eta)
        d = denoise.eps(x, here)
        if down == 0:
            x = x + (down - here.sigma) * d
            continue
        middle = levels.at(math.sqrt(here.sigma * down))
        d = denoise.eps(x + (middle.sigma - here.sigma) * d, middle)
        x = x + (down - here.sigma) * d + up * noise()
    return x


def dpmpp_2s_ancestral(
    denoise: Denoise, x: State, levels: Levels, noise: Noise, *, eta: float = 1.0
) -> State:
    """k-diffusion's DPM++ 2S a: x_0 at the geometric mean serves the step. One draw a step but the last."""
    for here, there in levels:
        down, up = ancestral_split(here.sigma, there.sigma, eta)
        x0 = denoise(x, here)
        if down > 0:
            middle = levels.at(math.sqrt(here.sigma * down))
            kept = middle.sigma / here.sigma
            x0 = denoise(kept * x + (1 - kept) * x0, middle)
        kept = down / here.sigma
        x = kept * x + (1 - kept) * x0
        if there.sigma > 0:
            x = x + up * noise()
    return x


def dpmpp_sde(denoise: Denoise, x: State, levels: Levels, noise: Noise, *, eta: float = 1.0) -> State:
    """k-diffusion's DPM++ SDE: both its stages start at the step's start and go along one Brownian path.

    Two draws a step, the path's increments over sigma before and after the middle; none in the step to 0.
    """
    for here, there in levels:
        x0 = denoise(x, here)
        if there.sigma == 0:
            x = x0
            continue
        middle = levels.at(math.sqrt(here.sigma * there.sigma))
        down, up = ancestral_split(here.sigma, middle.sigma, eta)
        early = noise()
        x0 = denoise(down / here.sigma * x + (1 - down / here.sigma) * x0 + up * early, middle)
        down, up = ancestral_split(here.sigma, there.sigma, eta)
        span = here.sigma - there.sigma
        path = math.sqrt((here.sigma - middle.sigma) / span) * early
        path = path + math.sqrt((middle.sigma - there.sigma) / span) * noise()
        x = down / here.sigma * x + (1 - down / here.sigma) * x0 + up * path
    return x


def dpmpp_singlestep(
    denoise: Denoise,
    x: State,
    levels: Levels,
    noise: Noise,
    *,
    order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
) -> State:
    """DPM-Solver++ singlestep (Lu et al., 2022): groups of `order` (1 to 3) calls that start from one point.

    The k-th call of a group goes from the group's first point to the k-th's end, with order k. A walk of n
    steps has n calls: at equal steps this is DPM++ 2S (or 3S) with fewer, longer steps.
    """
    if algorithm_type not in ("dpmsolver++", "deis"):
        raise UsageError(f"sampler.algorithm_type: {algorithm_type!r} is not built; use 'dpmsolver++'")
    orders = group_orders(levels, order, lower_order_final)[levels.skipped :]
    group: list[tuple[Level, State]] = []
    start = x
    for (here, there), now in zip(levels, orders, strict=True):
        m = denoise(x, here)
        if now == 1 or not group:
            start, group = x, []
        group.append((here, m))
        first = group[0][0]
        h = there.log_snr - first.log_snr
        estimate = group_sum(group, h, solver_type)
        x = there.sigma / first.sigma * start + there.alpha * estimate
    return x


def group_orders(levels: Levels, order: int, lower_order_final: bool) -> list[int]:
    """The order of each step of the whole walk: 1, 2, .. order over and over, falling off at its end."""
    n, clean = levels.total, levels.ends[-1].sigma == 0
    if not (lower_order_final or clean or n % order):
        return list(range(1, order + 1)) * (n // order)
    orders = [1 + i % order for i in range(n)]
    if order == 2 and n % 2 == 0:
        orders[-1] = 1
    if order == 3 and n % 3 == 0:
        orders[-3:] = [1, 2, 1]
    return [*orders[:-1], 1] if clean else orders


def group_sum(group: list[tuple[Level, State]], h: float, solver_type: str) -> State:
    """The integral of e^(lambda - end) x_0 over h from a group's first level, by its 1 to 3 estimates."""
    phi1 = -math.expm1(-h)
    (first, m0), *later = group
    if not later:
        return phi1 * m0
    r = [(level.log_snr - first.log_snr) / h for level, _ in later]
    slopes = [(m - m0) / q for q, (_, m) in zip(r, later, strict=True)]
    phi2 = 1 - phi1 / h
    if len(slopes) == 1:
        return phi1 * m0 + (phi2 if solver_type == "heun" else phi1 / 2) * slopes[0]
    if solver_type != "heun":
        return phi1 * m0 + phi2 * slopes[1]
    (r1, r0), (s1, s0) = r, slopes
    slope = (r0 * s1 - r1 * s0) / (r0 - r1)
    return phi1 * m0 + phi2 * slope - (phi2 / h - 0.5) * 2 * (s0 - s1) / (r0 - r1)
