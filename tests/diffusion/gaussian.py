"""Data with a law in closed form: x_0 ~ N(MEAN, SPREAD^2), for which the best network is known.

    E[x_0 | x] = m + alpha c^2 / (alpha^2 c^2 + sigma^2) (x - alpha m)

and the flow keeps (x - alpha m) / std(x). A state is a vector of factors of (1, start noise, noise 1, ...),
so that a whole law walks at once and its mean and variance come out exactly, with no draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from batchsd.diffusion.levels import Level, Levels
from batchsd.diffusion.program import HISTORY, NOISES, Program
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.diffusion.walk import gather, update

from .oracle import BASE

MEAN, SPREAD = 0.7, 0.4

SCHEDULE = NoiseSchedule.from_config({**BASE, "prediction_type": "sample"})


def spread_at(alpha: float, sigma: float) -> float:
    """The standard deviation of x at a level."""
    return math.hypot(alpha * SPREAD, sigma)


def smooth_levels(steps: int, vp: bool, top: float = 8.0, bottom: float = 0.3) -> Levels:
    """Even steps in log sigma that end above 0: there a method shows its order."""
    stops = []
    for ratio in np.geomspace(top, bottom, steps + 1):
        r = math.hypot(1, ratio) if vp else 1.0
        stops.append(Level(SCHEDULE.timestep_of(ratio), 1 / r, ratio / r))
    return Levels(tuple(stops[:-1]), tuple(stops[1:]), SCHEDULE, vp)


def call_levels(program: Program, vp: bool) -> list[tuple[float, float]]:
    """(alpha, sigma) at each call."""
    alphas = [1 / math.hypot(1, s) if vp else 1.0 for s in program.call_sigma]
    return [(a, a * s) for a, s in zip(alphas, program.call_sigma, strict=True)]


def gain(alpha: float, sigma: float) -> float:
    return alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)


def estimate(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The exact E[x_0 | x]; x [K] are factors, the first of the constant 1."""
    found = gain(alpha, sigma) * x
    found[0] += MEAN - gain(alpha, sigma) * alpha * MEAN
    return found


def law(program: Program, vp: bool, network=estimate) -> tuple[float, float]:
    """Mean and standard deviation of a walk's end, its start having the law of its level."""
    (alpha, sigma), noises = call_levels(program, vp)[0], int(program.draws.sum())
    x = torch.zeros(1, 2 + noises, dtype=torch.float64)
    x[0, 0], x[0, 1] = alpha * MEAN, spread_at(alpha, sigma)
    x_prev, history, used = torch.zeros_like(x), x.new_zeros(1, HISTORY, x.shape[1]), 2
    for i, level in enumerate(call_levels(program, vp)):
        noise = torch.zeros(1, NOISES, x.shape[1], dtype=torch.float64)
        for j in range(int(program.draws[i])):
            noise[0, j, used] = 1
            used += 1
        # prediction_type is "sample", so that the network's output is the estimate of x_0
        line = gather([program], [i], dtype=torch.float64)
        x, x_prev, history = update(line, x, x_prev, history, network(x[0], *level)[None], noise)
    return float(x[0, 0]), float(x[0, 1:].norm())


def flow_error(program: Program, levels: Levels, keeps: str, injected: int) -> float:
    """The error at the end of a deterministic walk whose first `injected` calls were exact."""
    called = call_levels(program, levels.vp)
    exact = [torch.tensor([[a * MEAN, spread_at(a, s)]], dtype=torch.float64) for a, s in called]
    history = torch.zeros(1, HISTORY, 2, dtype=torch.float64)
    for x, (a, s) in list(zip(exact, called, strict=True))[:injected]:
        x0 = estimate(x[0], a, s)
        h = x0 if keeps == "x0" else (x[0] - a * x0) / s
        history = torch.cat([h[None, None], history[:, :-1]], 1)
    x, x_prev = exact[injected], exact[injected - 1] if injected else torch.zeros_like(exact[0])
    for i in range(injected, len(program)):
        out = estimate(x[0], *called[i])[None]
        x, x_prev, history = update(gather([program], [i], dtype=torch.float64), x, x_prev, history, out)
    end = levels.ends[-1]
    return float((x[0] - torch.tensor([end.alpha * MEAN, spread_at(end.alpha, end.sigma)])).abs().max())


def slope(errors: Sequence[float]) -> float:
    """The order that errors at doubled step counts show, from the last two."""
    return math.log2(errors[-2] / errors[-1])
