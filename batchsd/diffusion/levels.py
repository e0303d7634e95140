"""Where a walk stops: for each step the noise level it starts from and the one it goes to.

A level is x = alpha x_0 + sigma eps with the timestep that the network is told. The DDIM family keeps
alpha^2 + sigma^2 = 1 (variance preserving, "VP"); k-diffusion's keeps alpha = 1 ("VE"), its sigma being
sigma / alpha of the former. A maker turns (schedule, steps, begin, options) into `Levels`. Spacings are table 2
of Lin et al. (2023); each maker says which of diffusers' `set_timesteps` it equals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.types import UsageError

SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level: x = alpha * x_0 + sigma * eps, told to the network as `timestep`."""

    timestep: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha: k-diffusion's sigma; infinite where x is noise alone."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma), the time of the DPM-Solver family; infinite where x is clean."""
        return -math.log(self.ratio) if self.sigma else math.inf


CLEAN = Level(0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Levels:
    """The steps that are left of a row's walk, iterated as (start, end).

    `skipped` steps came before (image to image); `init_noise` is the factor of the noise that a walk from
    noise alone starts at; `at` gives the level in between that has a k-diffusion sigma (mid-stages).
    """

    starts: tuple[Level, ...]
    ends: tuple[Level, ...]
    at: Callable[[float], Level]
    skipped: int = 0
    init_noise: float = 1.0

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[Level, Level]]:
        return zip(self.starts, self.ends, strict=True)

    @property
    def total(self) -> int:
        """The row's steps, the skipped ones included."""
        return self.skipped + len(self)


class LevelMaker(Protocol):
    """Makes the levels of a walk of `steps` steps, the first `begin` of them skipped.

    Its further keyword parameters are options of the schedulers that use it.
    """

    def __call__(self, schedule: NoiseSchedule, steps: int, begin: int, **options: Any) -> Levels: ...


# -- sigma schedules: (largest, smallest, count) -> decreasing float64 [count]


def karras(top: float, bottom: float, count: int, rho: float = 7.0) -> np.ndarray:
    """Linear in sigma^(1/rho) (Karras et al., 2022, eq. 5; rho 7 there too)."""
    ramp = np.linspace(0, 1, count)
    return (top ** (1 / rho) + ramp * (bottom ** (1 / rho) - top ** (1 / rho))) ** rho


def exponential(top: float, bottom: float, count: int) -> np.ndarray:
    """Linear in log sigma."""
    return np.exp(np.linspace(math.log(top), math.log(bottom), count))


CURVES: Mapping[str, Callable[[float, float, int], np.ndarray]] = {
    "karras": karras,
    "exponential": exponential,
}
"""Values of the option `sigmas`, beside "" and "model" (the training schedule's own at the spaced timesteps)."""


# -- timestep spacings


def spaced_timesteps(top: int, steps: int, spacing: str, offset: int, extra: int = 0) -> np.ndarray:
    """`steps` falling timesteps below `top`, float64; `linspace` ones are not yet rounded.

    `extra` = 1 spaces one more and drops the last, as the DPM-Solver family does. Raises UsageError.
    """
    if spacing not in SPACINGS:
        raise UsageError(f"sampler.spacing: {spacing!r} is unknown; have {', '.join(SPACINGS)}")
    if spacing == "linspace":
        t = np.linspace(0, top - 1, steps + extra)[::-1][:steps]
    elif spacing == "leading":
        t = np.arange(steps + extra)[::-1][:steps] * float(top // (steps + extra)) + offset
    else:
        # for some counts arange gives one too many, at -1
        t = np.arange(top, 0, -top / steps).round()[:steps] - 1
    whole = t.round() if extra else t
    if len(t) != steps or np.any(np.diff(whole) >= 0) or whole[0] > top - 1:
        raise UsageError(f"sampler.steps: {steps} are too many for {top} timesteps with spacing {spacing!r}")
    return t


def check_walk(schedule: NoiseSchedule, steps: int, begin: int) -> None:
    """Raise UsageError unless 0 <= begin < steps <= T."""
    if not 0 <= begin < steps <= len(schedule):
        raise UsageError(
            f"sampler.steps: {steps} (of which {begin} skipped) must be 1 to {len(schedule)}, at least one left"
        )


def variance_preserving(schedule: NoiseSchedule, sigma: float) -> Level:
    """The VP level at k-diffusion's sigma."""
    return Level(schedule.timestep_of(sigma), 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))


def trained_level(schedule: NoiseSchedule, t: int) -> Level:
    """The VP level of training timestep t."""
    ac = float(schedule.alphas_cumprod[t])
    return Level(float(t), math.sqrt(ac), math.sqrt(1 - ac))


# -- makers


def by_stride(
    schedule: NoiseSchedule,
    steps: int,
    begin: int,
    *,
    spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    final_sigma: str = "",
) -> Levels:
    """DDIM's: each step goes to t - T // steps, whether or not that is where the next one starts.

    A target below 0 is clean, or timestep 0's level with `set_alpha_to_one` false; `final_sigma` "zero" or
    "sigma_min" says the same and wins. VP; a zero-SNR start is exact. Equals DDIMScheduler.
    """
    check_walk(schedule, steps, begin)
    t = spaced_timesteps(len(schedule), steps, spacing, steps_offset).round().astype(int)
    clean_end = set_alpha_to_one if final_sigma == "" else is_zero(final_sigma)
    last = CLEAN if clean_end else trained_level(schedule, 0)
    targets = t - len(schedule) // steps
    ends = [trained_level(schedule, e) if e >= 0 else last for e in targets]
    starts = [trained_level(schedule, s) for s in t]
    return Levels(
        tuple(starts[begin:]), tuple(ends[begin:]), lambda s: variance_preserving(schedule, s), skipped=begin
    )


def is_zero(final_sigma: str) -> bool:
    """Read the option `final_sigma`; raises UsageError for another word than "zero" or "sigma_min"."""
    if final_sigma not in ("zero", "sigma_min"):
        raise UsageError(f"sampler.final_sigma: {final_sigma!r} is unknown; have zero, sigma_min")
    return final_sigma == "zero"


def curve(name: str) -> Callable[[float, float, int], np.ndarray] | None:
    """The sigma schedule of that name, None for the model's own; raises UsageError if unknown."""
    if name in ("", "model"):
        return None
    if name not in CURVES:
        raise UsageError(f"sampler.sigmas: {name!r} is unknown; have model, {', '.join(CURVES)}")
    return CURVES[name]


def on_sigmas(
    schedule: NoiseSchedule,
    steps: int,
    begin: int,
    *,
    spacing: str = "linspace",
    steps_offset: int = 0,
    sigmas: str = "",
    final_sigma: str = "zero",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Levels:
    """k-diffusion's: sigmas at spaced timesteps, not rounded; Karras and its kind between the spaced ends.

    `sigma_min`, `sigma_max` replace these ends. VE. Equals EulerDiscreteScheduler, which starts spacing
    "leading" at sqrt(sigma^2 + 1) times the noise.
    """
    check_walk(schedule, steps, begin)
    t = spaced_timesteps(len(schedule), steps, spacing, steps_offset)
    s = np.interp(t, np.arange(len(schedule)), schedule.sigmas)
    if bend := curve(sigmas):
        s = bend(sigma_max or s[0], sigma_min or s[-1], steps)
        t = np.array([schedule.timestep_of(x) for x in s])
    last = CLEAN if is_zero(final_sigma) else Level(0.0, 1.0, float(schedule.sigmas[0]))
    stops = [Level(float(a), 1.0, float(b)) for a, b in zip(t, s, strict=True)] + [last]
    top = float(s.max())
    return Levels(
        tuple(stops[begin:-1]),
        tuple(stops[begin + 1 :]),
        lambda x: Level(schedule.timestep_of(x), 1.0, x),
        skipped=begin,
        init_noise=math.hypot(top, 1) if spacing == "leading" else top,
    )


def on_log_snr(
    schedule: NoiseSchedule,
    steps: int,
    begin: int,
    *,
    spacing: str = "linspace",
    steps_offset: int = 0,
    sigmas: str = "",
    final_sigma: str = "zero",
    lambda_min_clipped: float = -math.inf,
) -> Levels:
    """DPM-Solver's: steps + 1 timesteps are spaced and the last dropped; Karras and its kind run between the
    training schedule's ends; timesteps told to the network are whole. VP. Equals DPMSolverMultistepScheduler.

    `lambda_min_clipped` leaves out training timesteps of a lower log SNR (for the cosine schedule).
    """
    check_walk(schedule, steps, begin)
    model = schedule.sigmas
    top = int(np.sum(-np.log(model) >= lambda_min_clipped))
    t = spaced_timesteps(top, steps, spacing, steps_offset, extra=1).round()
    s = np.interp(t, np.arange(len(schedule)), model)
    if bend := curve(sigmas):
        s = bend(float(model[-1]), float(model[0]), steps)
        t = np.array([schedule.timestep_of(x) for x in s])
        # diffusers rounds Karras' timesteps (not on the cosine schedule), and cuts off what is left of others'
        rounds = sigmas == "karras" and schedule.config.get("beta_schedule") != "squaredcos_cap_v2"
        t = t.round() if rounds else np.floor(t)
    end = 0.0 if is_zero(final_sigma) else float(model[0])
    levels = [variance_preserving(schedule, float(x)) for x in [*s, end]]
    stops = [Level(float(a), b.alpha, b.sigma) for a, b in zip([*t, 0.0], levels, strict=True)]
    return Levels(
        tuple(stops[begin:-1]), tuple(stops[begin + 1 :]), lambda x: variance_preserving(schedule, x), begin
    )
