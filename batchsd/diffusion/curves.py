"""Sigma schedules: how k-diffusion's sigma falls from `top` to `bottom` in `count` values.

The model's own schedule takes the sigmas of the spaced timesteps; these bend the way instead, e.g. Karras

    sigma_i = (top^(1/7) + i / (count - 1) * (bottom^(1/7) - top^(1/7)))^7
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.types import UsageError

Curve = Callable[[NoiseSchedule, float, float, int], np.ndarray]
"""(schedule, top, bottom, count) -> falling sigmas, float64 [count]; 0 comes after them."""

AYS_SD15 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
"""Align your steps (Sabour et al., 2024): the sigmas its authors publish for ten steps."""


def karras(_schedule: NoiseSchedule, top: float, bottom: float, count: int) -> np.ndarray:
    """Linear in sigma^(1/7) (Karras et al., 2022, eq. 5)."""
    ramp = np.linspace(0, 1, count)
    return (top ** (1 / 7) + ramp * (bottom ** (1 / 7) - top ** (1 / 7))) ** 7


def exponential(_schedule: NoiseSchedule, top: float, bottom: float, count: int) -> np.ndarray:
    """Linear in log sigma."""
    return np.exp(np.linspace(math.log(top), math.log(bottom), count))


def beta(_schedule: NoiseSchedule, top: float, bottom: float, count: int) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6): dense at both ends (Lee et al., 2024)."""
    return bottom + beta_quantiles(1 - np.linspace(0, 1, count)) * (top - bottom)


def beta_quantiles(p: np.ndarray, a: float = 0.6) -> np.ndarray:
    """The inverse of the distribution function of Beta(a, a), by bisection; p in [0, 1], to about 1e-9.

    With u = x^a the density's pole at 0 goes: F(x) is in proportion to the integral of (1 - u^(1/a))^(a - 1)
    from 0 to x^a. The upper half mirrors the lower.
    """
    nodes, weights = np.polynomial.legendre.leggauss(96)

    def area(u: np.ndarray) -> np.ndarray:
        inside = u[:, None] * (nodes + 1) / 2
        return u / 2 * ((1 - inside ** (1 / a)) ** (a - 1) @ weights)

    share = np.minimum(p, 1 - p) * 2
    low, high = np.zeros_like(p), np.full_like(p, 0.5**a)
    whole = area(high)
    for _ in range(60):
        middle = (low + high) / 2
        below = area(middle) < share * whole
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    x = np.where(share > 0, high, 0.0) ** (1 / a)
    return np.where(p <= 0.5, x, 1 - x)


def sgm_uniform(schedule: NoiseSchedule, top: float, bottom: float, count: int) -> np.ndarray:
    """Even timesteps from top to bottom, the last left out (ComfyUI's and Stability's "sgm_uniform")."""
    t = np.linspace(schedule.timestep_of(top), schedule.timestep_of(bottom), count + 1)[:-1]
    return np.exp(np.interp(t, np.arange(len(schedule)), np.log(schedule.sigmas)))


def align_your_steps(table: tuple[float, ...]) -> Curve:
    """A published table, log-linearly at as many steps; it brings its own ends."""

    def curve(_schedule: NoiseSchedule, _top: float, _bottom: float, count: int) -> np.ndarray:
        place = np.linspace(0, 1, count + 1)[:-1]
        return np.exp(np.interp(place, np.linspace(0, 1, len(table)), np.log(table)))

    return curve


CURVES: Mapping[str, Curve] = {
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "sgm_uniform": sgm_uniform,
    "align_your_steps": align_your_steps(AYS_SD15),
    "align_your_steps_sdxl": align_your_steps(AYS_SDXL),
}
"""Values of the option `sigmas`, beside "" and "model"."""


def curve_named(name: str) -> Curve | None:
    """The sigma schedule of that name, None for the model's own; raises UsageError if unknown."""
    if name in ("", "model"):
        return None
    if name not in CURVES:
        raise UsageError(f"sampler.sigmas: {name!r} is unknown; have model, {', '.join(CURVES)}")
    return CURVES[name]
