"""Schedulers of diffusers in a job, `scheduler = "diffusers:EulerDiscreteScheduler"`, and of your own as one:

    @hookimpl
    def register_schedulers():
        return {"mine": from_diffusers("mine", MyScheduler)}            # a class, or a configured object

A diffusers scheduler is an object that keeps state between calls of `step`. Here its `step` runs on stand-ins for
latents (`Form`) that know sums and multiples and nothing else: batchsd's tracer makes its table of that, so that rows
on it share a batch with all others. What does more to a latent (clips it, compares it) is refused, with the
word for it.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from batchsd import Level, Levels, Scheduler, UsageError, hookimpl
from batchsd_diffusers_scheduler.forms import SHAPE, Draws, Form, Unfit

CLASSES = (
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
"""Classes of diffusers for Stable Diffusion's process that become tables. A test tries all that diffusers has."""

ANOTHER = "it walks another process than Stable Diffusion's"
REFUSED = {
    "DDIMInverseScheduler": "it walks from a picture to noise",
    "DPMSolverMultistepInverseScheduler": "it walks from a picture to noise",
    "DPMSolverSDEScheduler": "its noise is not the row's generator's; dpmpp_sde is that method with the row's",
    "RePaintScheduler": "it wants a picture and a mask at each step; the task inpaint blends them in with any",
    **dict.fromkeys((
        "AmusedScheduler", "BlockRefinementScheduler", "CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler", "CosineDPMSolverMultistepScheduler", "DDPMWuerstchenScheduler",
        "DiscreteDDIMScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EntropyBoundScheduler",
        "FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler", "HeliosDMDScheduler", "HeliosScheduler", "IPNDMScheduler", "KarrasVeScheduler",
        "LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler", "PiflowScheduler", "RFD4ProteinaScheduler",
        "SCMScheduler", "ScoreSdeVeScheduler", "UnCLIPScheduler", "VQDiffusionScheduler",
    ), ANOTHER),
}  # fmt: skip
"""The others, and why a job cannot have them."""

NEEDED = ("alphas_cumprod", "init_noise_sigma", "order", "scale_model_input", "add_noise", "set_timesteps", "step")
PROCESS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "rescale_betas_zero_snr")
CURVES = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
KEYS = {"spacing": "timestep_spacing", "final_sigma": "final_sigmas_type"}
ONE, ZERO = (torch.full(SHAPE, value, dtype=torch.float64) for value in (1.0, 0.0))
REASONS = {
    "thresholding": "dynamic thresholding is not linear in the latent",
    "clip_sample": "clipping is not linear in the latent",
    "use_flow_sigmas": f"flow matching: {ANOTHER}",
}
"""Settings that make a class unfit, when they are true."""


# -- a scheduler as batchsd's two functions: levels, and the walk down them


@dataclass(frozen=True)
class Walk(Levels):
    """Levels with the diffusers object, set to the first of its calls, and the timesteps of the calls."""

    scheduler: Any = None
    timesteps: tuple[Any, ...] = ()


def from_diffusers(name: str, given: Any, **fields: Any) -> Scheduler:
    """A batchsd scheduler that walks as diffusers' does. `fields` are those of `batchsd.Scheduler`, e.g. `aliases`.

    `given` is a class, which a job's checkpoint configures as `Class.from_config` does (but for `clip_sample`, which
    Stable Diffusion's pipelines turn off), or an object, which keeps its own settings; the noise schedule and what the
    network predicts always are the checkpoint's. `sampler.spacing`, `sigmas`, `final_sigma` and `eta` work where the
    class has them. Raises UsageError, when it is traced, if it is no sum of latents, network outputs and noise.
    """
    kind = given if isinstance(given, type) else type(given)
    takes = inspect.signature(kind).parameters
    options: dict[str, Any] = {ours: "" for ours, theirs in KEYS.items() if theirs in takes}
    if set(CURVES.values()) & set(takes):
        options["sigmas"] = ""

    made: list[tuple[dict[str, Any], Any]] = []  # KDPM2's classes take half a second to make, and a job needs one

    def blank(config: dict[str, Any]) -> Any:
        if not made or made[0][0] != config:
            made[:] = [(config, kind.from_config(config))]
        return made[0][1]

    def levels(schedule: Any, steps: int, begin: int, **said: Any) -> Walk:
        if not 0 <= begin < steps <= len(schedule):
            raise UsageError(f"sampler.steps: {steps}, of which {begin} skipped: must be 1 to {len(schedule)}")
        return guarded(name, kind, lambda: walk(blank(configured(given, schedule, said)), schedule, steps, begin))

    def sampler(denoise: Any, x: Any, levels: Walk, noise: Any, **extra: Any) -> Any:
        return guarded(name, kind, lambda: walked(denoise, x, levels, noise, extra))

    eta = inspect.signature(kind.step).parameters.get("eta") if hasattr(kind, "step") else None
    sampler.__name__ = kind.__name__
    narrow(levels, options)
    narrow(sampler, {"eta": eta.default} if eta else {})
    calls = getattr(kind, "order", 1)
    return Scheduler(name, sampler, levels, keeps="either", calls=calls, **{"refuses": {}, **fields})


def narrow(function: Any, options: Mapping[str, Any]) -> None:
    """What batchsd reads as the options of a function: its keyword parameters, here without the catch-all."""
    signature = inspect.signature(function)
    plain = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in options.items()]
    function.__signature__ = signature.replace(parameters=[*plain, *keywords])


def guarded(name: str, kind: type, run: Callable[[], Any]) -> Any:
    """Run it; what the scheduler does or raises that fits no table becomes one UsageError that names it."""
    where = f"scheduler {name!r} cannot run as a table: diffusers' {kind.__name__}"
    remarks = logging.getLogger("diffusers")
    level = remarks.level
    remarks.setLevel(logging.ERROR)  # it remarks on every default that does not go with another
    try:
        return run()
    except Unfit as reason:
        raise UsageError(f"{where} {reason}") from None
    except (AttributeError, ImportError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{where} raises {type(error).__name__}: {' '.join(str(error).split())}") from error
    finally:
        remarks.setLevel(level)


def configured(given: Any, schedule: Any, said: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the object to walk with: see `from_diffusers`."""
    of_class = isinstance(given, type)
    config = dict(schedule.config)
    if not of_class:
        config = {**given.config, **{key: config[key] for key in PROCESS if key in config}}
    config |= {KEYS[key]: value for key, value in said.items() if key in KEYS and value}
    if curve := said.get("sigmas"):
        if curve not in CURVES:
            raise UsageError(f"sampler.sigmas: diffusers has {', '.join(CURVES)}, not {curve!r}")
        config |= {flag: word == curve for word, flag in CURVES.items()}
    if of_class:
        as_pipelines = {"clip_sample": False, "skip_prk_steps": config.get("skip_prk_steps", True)}
        config |= {key: value for key, value in as_pipelines.items() if key in inspect.signature(given).parameters}
    for key, reason in REASONS.items():
        if config.get(key):
            raise Unfit(f"has {key} on: {reason}")
    return {**config, "prediction_type": schedule.prediction_type}


def walk(blank: Any, schedule: Any, steps: int, begin: int) -> Walk:
    """The levels where the object asks the network, found by a dry run."""
    missing = [word for word in NEEDED if not hasattr(blank, word)]
    if missing:
        raise Unfit(f"has no {missing[0]}: {ANOTHER}")
    scheduler = copy.deepcopy(blank)
    scheduler.set_timesteps(steps)
    if not schedule.zero_snr:
        # Told eps, not v or x_0, a class does the same, and some know nothing else (PNDM mixes v's of several levels).
        # Only a start without signal needs v.
        scheduler.register_to_config(prediction_type="epsilon")
    for key, value in vars(scheduler).items():  # float32 rounding would pass for a term that a table lacks
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(scheduler, key, value.double())
    first = begin * scheduler.order
    begin_at(scheduler, first)
    timesteps = tuple(scheduler.timesteps[first:])
    dry, asked, starts = copy.deepcopy(scheduler), copy.deepcopy(scheduler), []
    one, zero = Form(torch.ones(())), Form(torch.zeros(()))
    with Draws(lambda: zero):
        for i, t in enumerate(timesteps):
            scale = float(dry.scale_model_input(one, t).held)
            starts.append(level(float(t), *noised(asked, first + i, t), scale))
            dry.step(zero, t, zero, return_dict=False)
    ends = (*starts[1:], Level(0.0, 1.0, 0.0))
    noise = float(scheduler.init_noise_sigma)
    vp = starts[0].alpha < 1
    return Walk(tuple(starts), ends, schedule, vp, begin, noise, scheduler=scheduler, timesteps=timesteps)


def noised(scheduler: Any, call: int, t: Any) -> tuple[float, float]:
    """alpha and sigma of x at a call, as the scheduler counts: its own two numbers, or what it makes of 1 and of 0."""
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver's kin; SASolver.add_noise rounds the timestep
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[call])
        return float(alpha), float(sigma)
    begin_at(scheduler, call)
    pairs = (ONE, ZERO), (ZERO, ONE)
    alpha, sigma = (float(scheduler.add_noise(clean, noise, t[None]).mean()) for clean, noise in pairs)
    return alpha, sigma


def begin_at(scheduler: Any, call: int) -> None:
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(call)


def level(timestep: float, alpha: float, sigma: float, scale: float) -> Level:
    """A call's level: x = alpha x_0 + sigma eps, shown to the network as scale * x, of variance 1 for data of 1."""
    if abs(math.hypot(alpha, sigma) * scale - 1) < 1e-9:
        return Level(timestep, alpha, sigma)
    if 0 < scale < 1:  # a stage between two steps, whose noise `add_noise` does not know: alpha is 1 in these classes
        return Level(timestep, 1.0, math.sqrt(1 / scale**2 - 1))
    raise Unfit(f"shows the network x * {scale:.4g} at timestep {timestep:g}: {ANOTHER}")


def walked(denoise: Any, x: Any, levels: Walk, noise: Any, extra: Mapping[str, Any]) -> Any:
    """The object's own walk, from x, on forms."""
    scheduler = copy.deepcopy(levels.scheduler)
    predicts = scheduler.config.prediction_type
    with Draws(lambda: Form(noise())):
        for here, t in zip(levels.starts, levels.timesteps, strict=True):
            form = Form(x)
            scheduler.scale_model_input(form, t)
            output = Form(said(denoise, x, here, predicts))
            moved = scheduler.step(output, t, form, return_dict=False, **extra)[0]
            if not isinstance(moved, Form):
                raise Unfit("gives back what is not made of the latent")
            x = moved.held
    return x


def said(denoise: Any, x: Any, here: Level, predicts: str) -> Any:
    """The network's output as the scheduler is to read it, by one call."""
    if predicts == "epsilon":
        return denoise.eps(x, here)
    clean = denoise(x, here)
    if predicts == "sample":
        return clean
    r = math.hypot(here.alpha, here.sigma)  # v = (alpha eps - sigma x_0) / r, with eps = (x - alpha x_0) / sigma
    return x * (here.alpha / (here.sigma * r)) - clean * (r / here.sigma)


# -- what a job may say


@hookimpl
def register_schedulers() -> dict[str, Scheduler]:
    return every()


@cache
def every() -> dict[str, Scheduler]:
    """All of diffusers, under `diffusers:<class>`; made once, so that their tables are remembered."""
    import diffusers

    here = [name for name in CLASSES if hasattr(diffusers, name)]
    found = [from_diffusers(f"diffusers:{name}", getattr(diffusers, name)) for name in here]
    found += [Scheduler(f"diffusers:{name}", walked, refused=reason) for name, reason in REFUSED.items()]
    return {scheduler.name: scheduler for scheduler in found}
