"""The built-in schedulers, one table of names: ours, then A1111's and k-diffusion's, and diffusers' class.

A class of diffusers stands at the scheduler that reads all its settings from the checkpoint; the names of
its variants preset what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from batchsd.diffusion import levels, multistep, samplers, stages
from batchsd.diffusion.curves import CURVES
from batchsd.diffusion.scheduler import Scheduler, keyword_defaults, with_sigmas
from batchsd.types import UsageError

# what the classes that lack these settings do, whatever another class's config says
TO_ZERO = {"final_sigma": "zero", "sigma_min": None, "sigma_max": None}
TO_MIN = {"final_sigma": "sigma_min"}


def dpmpp(name: str, *aliases: str, diffusers: str = "", **preset: Any) -> Scheduler:
    """A member of the DPM-Solver++ multistep family; what it does not preset comes from the checkpoint."""
    return Scheduler(
        name,
        multistep.dpmpp_multistep,
        levels.on_log_snr,
        preset=preset,
        aliases=aliases,
        diffusers=diffusers,
    )


def unipc(name: str, *aliases: str, diffusers: str = "", **preset: Any) -> Scheduler:
    """UniPC; what it does not preset comes from the checkpoint."""
    return Scheduler(
        name, multistep.unipc, levels.on_log_snr, preset=preset, aliases=aliases, diffusers=diffusers
    )


TABLE = [
    Scheduler(
        "ddim",
        samplers.ddim,
        levels.by_stride,
        preset={"final_sigma": ""},
        aliases=("DDIM",),
        diffusers="DDIMScheduler",
    ),
    Scheduler("ddpm", samplers.ddpm, levels.by_neighbour, aliases=("DDPM",), diffusers="DDPMScheduler"),
    Scheduler(
        "pndm",
        multistep.plms,
        levels.by_plms,
        keeps="eps",
        preset={"final_sigma": ""},
        aliases=("PLMS", "PNDM"),
        diffusers="PNDMScheduler",
    ),
    Scheduler(
        "lms",
        multistep.lms,
        keeps="eps",
        preset={**TO_ZERO, "order": 4},
        aliases=("LMS", "sample_lms", "k_lms"),
        diffusers="LMSDiscreteScheduler",
    ),
    Scheduler(
        "euler",
        samplers.euler,
        aliases=("Euler", "sample_euler", "k_euler"),
        diffusers="EulerDiscreteScheduler",
    ),
    Scheduler(
        "euler_a",
        samplers.euler_ancestral,
        preset={**TO_ZERO, "sigmas": ""},
        aliases=("Euler a", "sample_euler_ancestral", "k_euler_ancestral"),
        diffusers="EulerAncestralDiscreteScheduler",
    ),
    Scheduler(
        "heun",
        stages.heun,
        preset=TO_ZERO,
        aliases=("Heun", "sample_heun", "k_heun"),
        diffusers="HeunDiscreteScheduler",
        calls=2,
    ),
    Scheduler(
        "dpm2",
        stages.dpm2,
        preset={**TO_ZERO, "round_karras": True},
        aliases=("DPM2", "sample_dpm_2", "k_dpm_2"),
        diffusers="KDPM2DiscreteScheduler",
        calls=2,
    ),
    Scheduler(
        "dpm2_a",
        stages.dpm2_ancestral,
        preset={**TO_ZERO, "round_karras": True},
        aliases=("DPM2 a", "sample_dpm_2_ancestral", "k_dpm_2_ancestral"),
        diffusers="KDPM2AncestralDiscreteScheduler",
        calls=2,
    ),
    Scheduler(
        "dpmpp_2s",
        stages.dpmpp_singlestep,
        levels.on_log_snr,
        preset={"spacing": "linspace", "order": 2},
        aliases=("DPM++ 2S",),
    ),
    Scheduler(
        "dpm_singlestep",
        stages.dpmpp_singlestep,
        levels.on_log_snr,
        preset={"spacing": "linspace"},
        diffusers="DPMSolverSinglestepScheduler",
    ),
    Scheduler(
        "dpmpp_2s_a",
        stages.dpmpp_2s_ancestral,
        preset=TO_ZERO,
        aliases=("DPM++ 2S a", "sample_dpmpp_2s_ancestral"),
        calls=2,
    ),
    Scheduler(
        "dpmpp_sde",
        stages.dpmpp_sde,
        preset=TO_ZERO,
        aliases=("DPM++ SDE", "sample_dpmpp_sde"),
        diffusers="DPMSolverSDEScheduler",
        calls=2,
    ),
    dpmpp("dpm_multistep", diffusers="DPMSolverMultistepScheduler"),
    dpmpp("dpmpp_2m", "DPM++ 2M", "sample_dpmpp_2m", order=2, algorithm_type="dpmsolver++"),
    dpmpp("dpmpp_3m", "DPM++ 3M", order=3, algorithm_type="dpmsolver++"),
    dpmpp("dpmpp_2m_sde", "DPM++ 2M SDE", "sample_dpmpp_2m_sde", order=2, algorithm_type="sde-dpmsolver++"),
    dpmpp(
        "dpmpp_2m_sde_heun",
        "DPM++ 2M SDE Heun",
        order=2,
        algorithm_type="sde-dpmsolver++",
        solver_type="heun",
    ),
    dpmpp(
        "dpmpp_3m_sde",
        "DPM++ 3M SDE",
        "sample_dpmpp_3m_sde",
        order=3,
        algorithm_type="sde-dpmsolver++",
        solver_type="heun",
        lower_order_final=False,
    ),
    Scheduler(
        "deis",
        multistep.deis,
        levels.on_log_snr,
        keeps="eps",
        preset=TO_MIN,
        aliases=("DEIS",),
        diffusers="DEISMultistepScheduler",
    ),
    unipc("unipc", "UniPC", "uni_pc", diffusers="UniPCMultistepScheduler"),
    unipc("unipc_bh1", solver_type="bh1"),
    unipc("unipc_bh2", "uni_pc_bh2", solver_type="bh2"),
    Scheduler(
        "sa_solver",
        multistep.sa_solver,
        levels.on_log_snr,
        preset=TO_MIN,
        aliases=("SA-Solver",),
        diffusers="SASolverScheduler",
    ),
    Scheduler("lcm", samplers.lcm, levels.by_distillation, aliases=("LCM",), diffusers="LCMScheduler"),
    Scheduler("tcd", samplers.tcd, levels.by_distillation, aliases=("TCD",), diffusers="TCDScheduler"),
]

BUILTIN: Mapping[str, Scheduler] = {s.name: s for s in TABLE}
"""Every built-in scheduler by our name."""


def names(schedulers: Iterable[Scheduler]) -> dict[str, Scheduler]:
    """Every name (lower case) -> scheduler, aliases and diffusers' classes included.

    Raises UsageError, naming both, where two schedulers claim a name.
    """
    found: dict[str, Scheduler] = {}
    for scheduler in schedulers:
        for name in filter(None, (scheduler.name, *scheduler.aliases, scheduler.diffusers)):
            owner = found.setdefault(name.lower(), scheduler)
            if owner is not scheduler:
                both = f"{owner.name!r} and {scheduler.name!r}"
                raise UsageError(f"schedulers {both} both claim the name {name!r}; rename one")
    return found


@lru_cache(maxsize=8)
def spellings(schedulers: tuple[Scheduler, ...]) -> dict[str, tuple[Scheduler, str]]:
    """Every name (lower case) -> scheduler and the sigma schedule that the name asks for, "" for its own.

    Where a scheduler takes sigma schedules, their words may stand behind each of its names: "DPM++ 2M Karras",
    `dpmpp_2m_karras`. Raises UsageError as `names`.
    """
    found = {name: (scheduler, "") for name, scheduler in names(schedulers).items()}
    for name, (scheduler, _) in tuple(found.items()):
        if "sigmas" in keyword_defaults(scheduler.levels):
            for word in CURVES:
                for tail in (f"_{word}", f" {word}", " " + word.replace("_", " ")):
                    found.setdefault(name + tail, (scheduler, word))
    return found


def resolve(name: str, config: Mapping[str, Any], schedulers: Mapping[str, Scheduler] = BUILTIN) -> Scheduler:
    """The scheduler of that name, in any of its `spellings` and any case.

    "model" is the one that `config`, the checkpoint's scheduler_config.json, was written for. Raises
    UsageError that lists the known names.
    """
    wanted, said = name.lower(), repr(name)
    if wanted == "model":
        wanted = str(config.get("_class_name", "")).lower()
        said = f"'model' (scheduler_config.json: _class_name: {config.get('_class_name')!r})"
    found, sigmas = spellings(tuple(schedulers.values())).get(wanted, (None, ""))
    if found is None:
        raise UsageError(
            f"sampler.scheduler: {said} is unknown; have model, {', '.join(sorted(schedulers))}, "
            f"most also with {', '.join(CURVES)} behind the name"
        )
    return with_sigmas(found, sigmas) if sigmas else found


def common_name(name: str, config: Mapping[str, Any], schedulers: Mapping[str, Scheduler]) -> tuple[str, str]:
    """A1111's name of a scheduler, and of the sigma schedule that it presets: ("DPM++ 2M", "Karras").

    The name as it is, and "", where there is none.
    """
    found = resolve(name, config, schedulers)
    return next(iter(found.aliases), name), str(found.preset.get("sigmas", "")).replace("_", " ").title()
