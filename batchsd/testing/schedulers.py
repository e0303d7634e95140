"""A scheduler's contract, on vectors of a few numbers: for Gaussian data the perfect network is known.

    data ~ N(m, s^2),  x = alpha x_0 + sigma eps,  v = alpha^2 s^2 + sigma^2 (the variance of x)
    trained:    E[x_0 | x] = m + alpha s^2 / v * (x - alpha m)
    distilled:  end of x's path = m + s / sqrt(v) * (x - alpha m)

Everything is linear, so the mean and variance that a walk ends with are read off exactly, without sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

from batchsd.types import UsageError

if TYPE_CHECKING:
    import torch

    from batchsd.diffusion.program import Program
    from batchsd.diffusion.schedule import NoiseSchedule
    from batchsd.diffusion.scheduler import Scheduler
    from batchsd.diffusion.walk import Network

Clean = Callable[["torch.Tensor", float, float], "torch.Tensor"]
"""(x, alpha, sigma) -> the clean estimate."""

SD_CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
MEAN, STD = 0.3, 0.5
WALKS = (  # steps, how many of them are skipped, prediction type
    (1, 0, "epsilon"),
    (2, 0, "epsilon"),
    (5, 0, "epsilon"),
    (5, 0, "v_prediction"),
    (5, 0, "sample"),
    (20, 0, "epsilon"),
    (20, 8, "v_prediction"),
)


def posterior_mean(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """What a perfectly trained network takes for the clean picture: E[x_0 | x]."""
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)


def consistency(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """What a perfectly distilled network (LCM's) takes for it: the end of the noise-free path through x."""
    return MEAN + STD / math.hypot(alpha * STD, sigma) * (x - alpha * MEAN)


def check_scheduler(
    scheduler: Scheduler, tolerance: float = 0.1, clean: Clean = posterior_mean, steps: int = 100
) -> None:
    """A scheduler's promises, on Stable Diffusion's noise schedule.

    Its walks of 1, 2, 5 and 20 steps, and of 20 with the first 8 skipped, become tables of finite numbers,
    the same each time; the table equals the function to 1e-10; and `steps` steps turn noise into the data's
    mean and standard deviation within `tolerance` standard deviations (ancestral samplers of first order miss
    by 0.06). `clean` is what the network estimates: a sampler of distilled models takes `consistency`.
    """
    from batchsd.diffusion.schedule import NoiseSchedule
    from batchsd.diffusion.scheduler import Scheduler

    assert isinstance(scheduler, Scheduler), f"{scheduler!r} is not a batchsd.Scheduler"
    assert scheduler.name and isinstance(scheduler.name, str), f"name is {scheduler.name!r}; give it a word"
    for length, begin, prediction_type in WALKS:
        config = {**SD_CONFIG, "prediction_type": prediction_type}
        case = f"{scheduler.name!r}, {length} steps, {begin} skipped, {prediction_type}"
        schedule = NoiseSchedule.from_config(config)
        program = _program(scheduler, schedule, length, begin, case)
        # programs are remembered by schedule: an equal one asks anew
        again = _program(scheduler, NoiseSchedule.from_config(config), length, begin, case)
        _check_table(program, again, case)
        _check_function(scheduler, schedule, program, length, begin, case)
    _check_gaussian(scheduler, steps, tolerance, clean)


def _program(scheduler: Scheduler, schedule: NoiseSchedule, steps: int, begin: int, case: str) -> Program:
    try:
        return scheduler.program(schedule, steps, begin)
    except UsageError as error:
        raise AssertionError(f"{case}: {error}") from error


def _check_table(program: Program, again: Program, case: str) -> None:
    import numpy as np

    for field in fields(program):
        value = np.asarray(getattr(program, field.name))
        assert np.isfinite(value).all(), f"{case}: {field.name} holds NaN or infinity"
        same = np.array_equal(value, getattr(again, field.name))
        assert same, f"{case}: {field.name} differs when made again"


def _check_function(
    scheduler: Scheduler, schedule: NoiseSchedule, program: Program, steps: int, begin: int, case: str
) -> None:
    """The function itself, on tensors, against its table: the same network and the same draws."""
    import torch

    from batchsd.diffusion.scheduler import keyword_defaults
    from batchsd.diffusion.walk import NetworkDenoise, run_program

    start = torch.linspace(-2, 2, 5, dtype=torch.float64) * program.init_sigma + program.init_alpha * MEAN
    network = gaussian_network(schedule, posterior_mean)
    options = scheduler.resolved(schedule, {})
    ours = {name: options[name] for name in keyword_defaults(scheduler.levels)}
    theirs = {name: options[name] for name in keyword_defaults(scheduler.sampler)}
    levels = scheduler.levels(schedule, steps, begin, **ours)
    denoise = NetworkDenoise(network, schedule.prediction_type)
    function = scheduler.sampler(denoise, start, levels, _draws(), **theirs)
    table = run_program(program, network, start, _draws())
    error = float((function - table).abs().max() / (1 + function.abs().max()))
    assert error < 1e-10, f"{case}: the table is {error:.1e} away from the function"


def _draws() -> Callable[[], torch.Tensor]:
    """A source of noise that gives the same numbers each time it is made."""
    import torch

    generator = torch.Generator().manual_seed(7)
    return lambda: torch.randn(5, generator=generator, dtype=torch.float64)


def gaussian_network(schedule: NoiseSchedule, clean: Clean) -> Network:
    """The perfect network for data N(MEAN, STD^2): it predicts what the schedule's prediction type says."""
    import numpy as np

    log_ratio = np.log(schedule.sigmas)

    def network(x: torch.Tensor, timestep: float) -> torch.Tensor:
        ratio = float(np.exp(np.interp(timestep, np.arange(len(schedule)), log_ratio)))
        alpha, sigma = 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)
        x0 = clean(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        outputs = {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0}
        return outputs[schedule.prediction_type]

    return network


def _check_gaussian(scheduler: Scheduler, steps: int, tolerance: float, clean: Clean) -> None:
    """Mean and deviation at the end of a walk from noise, exactly.

    The walk is affine in its start and its draws. One entry of the vector starts from nothing and hears no
    noise: it ends at the mean. Each other entry hears one unit of one draw: it ends at the mean plus that
    draw's factor.
    """
    import torch

    from batchsd.diffusion.schedule import NoiseSchedule
    from batchsd.diffusion.walk import run_program

    schedule = NoiseSchedule.from_config(SD_CONFIG)
    program = _program(scheduler, schedule, steps, 0, f"{scheduler.name!r}, {steps} steps")
    units = torch.eye(2 + int(program.draws.sum()), dtype=torch.float64)
    noises = iter(units[2:])
    start = units[1] * program.init_noise
    end = run_program(program, gaussian_network(schedule, clean), start, lambda: next(noises))
    mean, std = float(end[0]), float((end[1:] - end[0]).norm())
    for name, value, true in (("mean", mean, MEAN), ("standard deviation", std, STD)):
        assert abs(value - true) < tolerance * STD, (
            f"{scheduler.name!r}: {steps} steps on data N({MEAN}, {STD}^2) end with {name} {value:.4f}, not "
            f"{true}"
        )
