"""What the tests of diffusion hold things against: a toy network, diffusers' loop, and our two ways to run."""

from __future__ import annotations

import diffusers
import torch

from batchsd.diffusion.levels import Levels
from batchsd.diffusion.program import NetworkDenoise, Program, run_program
from batchsd.diffusion.scheduler import Scheduler, keyword_defaults
from batchsd.diffusion.schedule import NoiseSchedule

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


def toy_network(x: torch.Tensor, t: float) -> torch.Tensor:
    """A smooth nonlinear stand-in: mixes channels and neighbours, depends on the timestep, stays bounded."""
    mixed = 0.6 * x + 0.3 * x.roll(1, dims=1) - 0.2 * x.roll(1, dims=-1)
    return torch.tanh(mixed + 0.3 * torch.sin(torch.tensor(t / 200.0, dtype=x.dtype))) * (0.7 + t / 4000)


def draws(seed: int, dtype: torch.dtype = torch.float32):
    """(a generator, a function that draws from it a tensor of SHAPE in float32, then cast)."""
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda: torch.randn(SHAPE, generator=generator, dtype=torch.float32).to(dtype)


def by_diffusers(class_name: str, config: dict, steps: int, begin: int = 0, **step_options) -> torch.Tensor:
    """The final latents of diffusers' own loop, as its pipelines run it; img2img if `begin`."""
    ours = diffusers.DDPMScheduler  # any class: from_config drops what the wanted class does not know
    del ours
    scheduler = getattr(diffusers, class_name).from_config(config)
    scheduler.set_timesteps(steps)
    generator, draw = draws(0)
    timesteps = scheduler.timesteps
    if begin:
        clean, noise = draw() * 0.5, draw()
        timesteps = timesteps[begin * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * scheduler.order)
        x = scheduler.add_noise(clean, noise, timesteps[:1])
    else:
        x = draw() * scheduler.init_noise_sigma
    for t in timesteps:
        out = toy_network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(out, t, x, **{k: generator if k == "generator" else v for k, v in step_options.items()})[0]
    return x


def start(program: Program, begin: int, draw, dtype=torch.float32) -> torch.Tensor:
    if begin:
        clean, noise = draw() * 0.5, draw()
        return (program.init_alpha * clean + program.init_sigma * noise).to(dtype)
    return draw() * program.init_noise


def by_table(
    scheduler: Scheduler, config: dict, steps: int, begin: int = 0, dtype=torch.float32, network=toy_network, **options
) -> torch.Tensor:
    """The final latents of the program."""
    program = scheduler.program(NoiseSchedule.from_config(config), steps, begin, **options)
    _, draw = draws(0, dtype)
    return run_program(program, network, start(program, begin, draw, dtype), draw)


def levels_of(scheduler: Scheduler, config: dict, steps: int, begin: int = 0, **options) -> Levels:
    schedule = NoiseSchedule.from_config(config)
    values = scheduler.resolved(schedule, options)
    return scheduler.levels(schedule, steps, begin, **{k: values[k] for k in keyword_defaults(scheduler.levels)})


def by_function(
    scheduler: Scheduler, config: dict, steps: int, begin: int = 0, dtype=torch.float32, network=toy_network, **options
) -> torch.Tensor:
    """The final latents of the sampler function itself, on tensors."""
    schedule = NoiseSchedule.from_config(config)
    program = scheduler.program(schedule, steps, begin, **options)
    _, draw = draws(0, dtype)
    values = scheduler.resolved(schedule, options)
    return scheduler.sampler(
        NetworkDenoise(network, schedule.prediction_type),
        start(program, begin, draw, dtype),
        levels_of(scheduler, config, steps, begin, **options),
        draw,
        **{k: values[k] for k in keyword_defaults(scheduler.sampler)},
    )


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over largest value."""
    assert torch.isfinite(ours).all() and torch.isfinite(theirs).all()
    return float((ours - theirs).abs().max() / theirs.abs().max())
