"""The built-in schedulers, by our name, A1111's, k-diffusion's and diffusers' class: one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from batchsd.diffusion import samplers
from batchsd.diffusion.levels import by_stride, on_log_snr
from batchsd.diffusion.scheduler import Scheduler, with_curves
from batchsd.types import UsageError

# k-diffusion's ancestral samplers take what levels they are given; diffusers' classes of them read no more than
# the spacing from a config, so that the rest is preset to what these classes do
PLAIN = {"sigmas": "", "final_sigma": "zero", "sigma_min": None, "sigma_max": None}



def dpmpp(name: str, *aliases: str, diffusers: str = "", **preset: Any) -> Scheduler:
    """A member of the DPM-Solver++ multistep family; what it does not preset comes from the checkpoint."""
    k_diffusion = (f"sample_{name}",) if aliases else ()
    return Scheduler(
        name,
        samplers.dpmpp_multistep,
        on_log_snr,
        preset=preset,
        aliases=(*aliases, *k_diffusion),
        diffusers=diffusers,
    )


TABLE = [
    Scheduler(
        "ddim",
        samplers.ddim,
        by_stride,
        preset={"final_sigma": ""},
        aliases=("DDIM",),
        diffusers="DDIMScheduler",
    ),
    Scheduler(
        "euler", samplers.euler, aliases=("Euler", "k_euler", "sample_euler"), diffusers="EulerDiscreteScheduler"
    ),
    Scheduler(
        "euler_a",
        samplers.euler_ancestral,
        preset=PLAIN,
        aliases=("Euler a", "k_euler_ancestral", "sample_euler_ancestral", "euler_ancestral"),
        diffusers="EulerAncestralDiscreteScheduler",
    ),
    dpmpp("dpm_multistep", diffusers="DPMSolverMultistepScheduler"),
    dpmpp("dpmpp_2m", "DPM++ 2M", order=2, algorithm_type="dpmsolver++"),
    dpmpp("dpmpp_2m_sde", "DPM++ 2M SDE", order=2, algorithm_type="sde-dpmsolver++"),
    dpmpp("dpmpp_2m_sde_heun", "DPM++ 2M SDE Heun", order=2, algorithm_type="sde-dpmsolver++", solver_type="heun"),
    dpmpp("dpmpp_3m", order=3, algorithm_type="dpmsolver++"),
    dpmpp("dpmpp_3m_sde", "DPM++ 3M SDE", order=3, algorithm_type="sde-dpmsolver++"),
]

BUILTIN: Mapping[str, Scheduler] = {s.name: s for one in TABLE for s in with_curves(one)}
"""Every built-in scheduler by our name."""


def names(schedulers: Iterable[Scheduler]) -> dict[str, Scheduler]:
    """Every name (lower case) -> scheduler, aliases and diffusers' classes included.

    Raises UsageError, naming both, where two schedulers claim a name.
    """
    found: dict[str, Scheduler] = {}
    for scheduler in schedulers:
        for name in (scheduler.name, *scheduler.aliases, scheduler.diffusers):
            owner = found.setdefault(name.lower(), scheduler)
            if name and owner is not scheduler:
                raise UsageError(f"schedulers {owner.name!r} and {scheduler.name!r} both claim the name {name!r}")
    found.pop("", None)
    return found


def resolve(name: str, config: Mapping[str, Any], schedulers: Mapping[str, Scheduler] = BUILTIN) -> Scheduler:
    """The scheduler of that name, in any spelling of case; "model" is the one that `config`, the checkpoint's
    scheduler_config.json, was written for. Raises UsageError that lists the known names.
    """
    known = names(schedulers.values())
    wanted, said = name, name
    if name == "model":
        wanted = config.get("_class_name", "")
        said = f"model ({wanted or 'scheduler_config.json has no _class_name'})"
    if wanted.lower() in known:
        return known[wanted.lower()]
    raise UsageError(f"sampler.scheduler: {said!r} is unknown; have model, {', '.join(sorted(schedulers))}")
