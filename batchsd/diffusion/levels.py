"""Where a walk stops: for each step the noise level it starts from and the one it goes to.

A level is x = alpha x_0 + sigma eps with the timestep that the network is told. The DDIM family keeps
alpha^2 + sigma^2 = 1 (variance preserving, "VP"); k-diffusion's keeps alpha = 1 ("VE"), its sigma being
sigma / alpha of the former. A maker turns (schedule, steps, begin, options) into `Levels`. Spacings are
table 2 of Lin et al. (2023); each maker says which of diffusers' `set_timesteps` it equals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from batchsd.diffusion.curves import curve_named
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

    `vp` tells which x they speak of. `skipped` steps came before (image to image); `init_noise` is the factor
    of the noise that a walk from noise alone starts at.
    """

    starts: tuple[Level, ...]
    ends: tuple[Level, ...]
    schedule: NoiseSchedule
    vp: bool
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

    def at(self, sigma: float) -> Level:
        """The level between steps (mid-stages) that has this k-diffusion sigma."""
        return level_at(self.schedule, sigma, self.vp)

    def trained(self, t: int) -> Level:
        """The VP level of training timestep t."""
        return trained_level(self.schedule, t)


LevelMaker = Callable[..., Levels]
"""(schedule, steps, begin, *, options with defaults) -> Levels of a walk, the first `begin` steps skipped."""


# -- timestep spacings


def spaced_timesteps(top: int, steps: int, spacing: str, offset: int, extra: int = 0) -> np.ndarray:
    """`steps` falling timesteps below `top`, float64; `linspace` ones are not yet rounded.

    `extra` = 1 spaces one more and drops the last, as the DPM-Solver family does. Raises UsageError.
    """
    if spacing not in SPACINGS:
        raise UsageError(f"sampler.spacing: {spacing!r} is unknown; have {', '.join(SPACINGS)}")
    t: np.ndarray
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


def whole_timesteps(schedule: NoiseSchedule, steps: int, spacing: str, offset: int) -> np.ndarray:
    """`spaced_timesteps`, rounded: int64 [steps]."""
    return spaced_timesteps(len(schedule), steps, spacing, offset).round().astype(int)


def check_walk(schedule: NoiseSchedule, steps: int, begin: int) -> None:
    """Raise UsageError unless 0 <= begin < steps <= T."""
    if not 0 <= begin < steps <= len(schedule):
        raise UsageError(
            f"sampler.steps: {steps}, of which {begin} skipped: must be 1 to {len(schedule)}, with one left"
        )


def level_at(schedule: NoiseSchedule, sigma: float, vp: bool) -> Level:
    """The level at k-diffusion's sigma."""
    r = math.hypot(1, sigma) if vp else 1.0
    return Level(schedule.timestep_of(sigma), 1 / r, sigma / r)


def trained_level(schedule: NoiseSchedule, t: int) -> Level:
    """The VP level of training timestep t."""
    ac = float(schedule.alphas_cumprod[t])
    return Level(float(t), math.sqrt(ac), math.sqrt(1 - ac))


def is_zero(final_sigma: str) -> bool:
    """Read the option `final_sigma`; raises UsageError for another word than "zero" or "sigma_min"."""
    if final_sigma not in ("zero", "sigma_min"):
        raise UsageError(f"sampler.final_sigma: {final_sigma!r} is unknown; have zero, sigma_min")
    return final_sigma == "zero"


# -- makers over training timesteps, VP: a zero-SNR start is exact


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
    "sigma_min" says the same and wins. Equals DDIMScheduler.
    """
    check_walk(schedule, steps, begin)
    t = whole_timesteps(schedule, steps, spacing, steps_offset)[begin:]
    clean_end = set_alpha_to_one if final_sigma == "" else is_zero(final_sigma)
    last = CLEAN if clean_end else trained_level(schedule, 0)
    ends = [trained_level(schedule, e) if e >= 0 else last for e in t - len(schedule) // steps]
    return Levels(tuple(trained_level(schedule, s) for s in t), tuple(ends), schedule, vp=True, skipped=begin)


def by_plms(
    schedule: NoiseSchedule,
    steps: int,
    begin: int,
    *,
    spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = False,
    final_sigma: str = "",
) -> Levels:
    """PNDM's: DDIM's, with the step to the second timestep once more in second place.

    Equals PNDMScheduler with skip_prk_steps; at `begin` it starts over, where diffusers' cut list does not.
    """
    once = by_stride(
        schedule,
        steps,
        begin,
        spacing=spacing,
        steps_offset=steps_offset,
        set_alpha_to_one=set_alpha_to_one,
        final_sigma=final_sigma,
    )
    if len(once) == 1:
        return once
    second = once.starts[1]
    back = trained_level(schedule, int(second.timestep) + len(schedule) // steps)
    starts = (once.starts[0], back, *once.starts[1:])
    return replace(once, starts=starts, ends=(once.ends[0], second, *once.ends[1:]))


def by_neighbour(
    schedule: NoiseSchedule, steps: int, begin: int, *, spacing: str = "leading", steps_offset: int = 0
) -> Levels:
    """DDPM's: each step goes to where the next one starts, the last to clean. Equals DDPMScheduler."""
    check_walk(schedule, steps, begin)
    t = whole_timesteps(schedule, steps, spacing, steps_offset)[begin:]
    starts = tuple(trained_level(schedule, s) for s in t)
    return Levels(starts, (*starts[1:], CLEAN), schedule, vp=True, skipped=begin)


def by_distillation(
    schedule: NoiseSchedule, steps: int, begin: int, *, original_inference_steps: int = 50
) -> Levels:
    """LCM's and TCD's: some of the timesteps that the network was distilled at, evenly from the top; the last
    step goes to timestep 0. Equals LCMScheduler and TCDScheduler.
    """
    check_walk(schedule, steps, begin)
    if steps > original_inference_steps:
        raise UsageError(
            f"sampler.steps: {steps} are more than the {original_inference_steps} of distillation"
        )
    stride = len(schedule) // original_inference_steps
    known = np.arange(original_inference_steps, 0, -1) * stride - 1
    t = known[np.floor(np.linspace(0, len(known), steps, endpoint=False)).astype(int)][begin:]
    starts = tuple(trained_level(schedule, s) for s in t)
    return Levels(starts, (*starts[1:], trained_level(schedule, 0)), schedule, vp=True, skipped=begin)


# -- makers over sigmas: zero SNR is clamped


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
    round_karras: bool = False,
) -> Levels:
    """k-diffusion's: sigmas at spaced timesteps, not rounded; Karras and its kind between the spaced ends.

    `sigma_min`, `sigma_max` replace these ends; `round_karras` tells the network whole timesteps there. VE.
    Equals EulerDiscreteScheduler, which starts spacing "leading" at sqrt(sigma^2 + 1) times the noise.
    """
    check_walk(schedule, steps, begin)
    t = spaced_timesteps(len(schedule), steps, spacing, steps_offset)
    s = np.interp(t, np.arange(len(schedule)), schedule.sigmas)
    if curve := curve_named(sigmas):
        s = curve(schedule, sigma_max or float(s[0]), sigma_min or float(s[-1]), steps)
        t = np.array([schedule.timestep_of(x) for x in s])
        t = t.round() if round_karras and sigmas == "karras" else t
    last = CLEAN if is_zero(final_sigma) else Level(0.0, 1.0, float(schedule.sigmas[0]))
    stops = [Level(float(a), 1.0, float(b)) for a, b in zip(t, s, strict=True)] + [last]
    top = float(s.max())
    start = math.hypot(top, 1) if spacing == "leading" else top
    return Levels(tuple(stops[begin:-1]), tuple(stops[begin + 1 :]), schedule, False, begin, start)


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
    if curve := curve_named(sigmas):
        s = curve(schedule, float(model[-1]), float(model[0]), steps)
        t = np.array([schedule.timestep_of(x) for x in s])
        # diffusers rounds Karras' timesteps (not on the cosine schedule), and floors the others'
        rounds = sigmas == "karras" and schedule.config.get("beta_schedule") != "squaredcos_cap_v2"
        t = t.round() if rounds else np.floor(t)
    end = CLEAN if is_zero(final_sigma) else level_at(schedule, float(model[0]), vp=True)
    levels = [level_at(schedule, float(x), vp=True) for x in s]
    stops = [*(replace(b, timestep=float(a)) for a, b in zip(t, levels, strict=True)), end]
    return Levels(tuple(stops[begin:-1]), tuple(stops[begin + 1 :]), schedule, True, begin)
