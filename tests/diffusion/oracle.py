"""What these tests hold things against: a toy network, diffusers' loop, and our two ways to run a sampler."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch

from batchsd.diffusion.program import Program
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.diffusion.scheduler import Scheduler, keyword_defaults
from batchsd.diffusion.walk import NetworkDenoise, run_program

SHAPE = (1, 4, 6, 6)

BASE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
"""The hub's scheduler_config.json of SD 1.5, with the keys that old files leave out."""

Draw = Callable[[], torch.Tensor]


def toy_network(x: torch.Tensor, t: float) -> torch.Tensor:
    """A smooth nonlinear stand-in: mixes channels and neighbours, depends on the timestep, stays bounded."""
    mixed = 0.6 * x + 0.3 * x.roll(1, dims=1) - 0.2 * x.roll(1, dims=-1)
    return torch.tanh(mixed + 0.3 * torch.sin(torch.tensor(t / 200.0, dtype=x.dtype))) * (0.7 + t / 4000)


def draws(dtype: torch.dtype = torch.float32) -> tuple[torch.Generator, Draw]:
    """A seeded generator, and a function that draws SHAPE from it in float32 and casts."""
    generator = torch.Generator().manual_seed(0)
    return generator, lambda: torch.randn(SHAPE, generator=generator).to(dtype)


def by_diffusers(
    name: str, config: dict, steps: int, begin: int = 0, eta: float | None = None
) -> torch.Tensor:
    """The final latents of diffusers' own loop, as its pipelines run it; image to image if `begin`."""
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    generator, draw = draws()
    timesteps = scheduler.timesteps[begin * scheduler.order :]
    if begin:
        clean, noise = draw() * 0.5, draw()
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * scheduler.order)
        x = scheduler.add_noise(clean, noise, timesteps[:1])
    else:
        x = draw() * scheduler.init_noise_sigma
    extra = {} if eta is None else {"eta": eta}
    if "generator" in scheduler.step.__code__.co_varnames:
        extra["generator"] = generator
    for t in timesteps:
        out = toy_network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(out, t, x, **extra)[0]
    return x


def start(program: Program, begin: int, draw: Draw) -> torch.Tensor:
    if not begin:
        return program.init_noise * draw()
    clean, noise = draw() * 0.5, draw()
    return program.init_alpha * clean + program.init_sigma * noise


def by_table(scheduler: Scheduler, config: dict, steps: int, begin: int = 0, dtype=torch.float32, **options):
    """The final latents of the program."""
    program = scheduler.program(NoiseSchedule.from_config(config), steps, begin, **options)
    _, draw = draws(dtype)
    return run_program(program, toy_network, start(program, begin, draw), draw)


def by_function(scheduler: Scheduler, config: dict, steps: int, begin: int = 0, **options):
    """The final latents of the sampler function itself, on float64 tensors."""
    schedule = NoiseSchedule.from_config(config)
    values = scheduler.resolved(schedule, options)
    ours = {k: values[k] for k in keyword_defaults(scheduler.levels)}
    theirs = {k: values[k] for k in keyword_defaults(scheduler.sampler)}
    levels = scheduler.levels(schedule, steps, begin, **ours)
    program = scheduler.program(schedule, steps, begin, **options)
    _, draw = draws(torch.float64)
    x = start(program, begin, draw)
    return scheduler.sampler(NetworkDenoise(toy_network, schedule.prediction_type), x, levels, draw, **theirs)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over largest value."""
    assert torch.isfinite(ours).all()
    assert torch.isfinite(theirs).all()
    return float((ours - theirs).abs().max() / theirs.abs().max())
