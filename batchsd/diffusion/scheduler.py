"""A `Scheduler` is what a plugin registers: a sampler, how its levels are made, and the names it goes by.

    program = Scheduler("mine", sampler=mine).program(schedule, steps=20)

Its options are the keyword parameters of these two functions. A value comes, in rising order, from their
defaults, `defaults`, the checkpoint's scheduler_config.json, `preset` (what the name means), and the job.
So a name equals diffusers' `Class.from_config(the checkpoint's scheduler config)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from batchsd.diffusion.levels import LevelMaker, on_sigmas
from batchsd.diffusion.program import Program
from batchsd.diffusion.samplers import Sampler
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.diffusion.tracing import Keeps, trace
from batchsd.types import UsageError

CONFIG_KEYS: Mapping[str, str] = {
    "spacing": "timestep_spacing",
    "order": "solver_order",
    "final_sigma": "final_sigmas_type",
}
"""Options that scheduler_config.json calls by another name."""

SIGMA_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
"""Flags of scheduler_config.json and the value of the option `sigmas` that each stands for."""

NOT_BUILT: Mapping[tuple[str, Any], str] = {
    ("thresholding", True): "dynamic thresholding is not linear in the latent",
    ("use_flow_sigmas", True): "flow matching is another process than this one",
    ("use_dynamic_shifting", True): "flow matching is another process than this one",
    ("use_lu_lambdas", True): "not built; sigmas = 'exponential' takes the same steps",
    ("timestep_type", "continuous"): "not built",
    ("interpolation_type", "log_linear"): "not built",
    ("predict_x0", False): "UniPC on eps is not built",
}
"""Settings of scheduler_config.json that would change pictures and that no table of ours does.

`clip_sample` is not among them: diffusers' Stable Diffusion pipelines turn it off, and so do we.
"""


@dataclass(frozen=True, eq=False)
class Scheduler:
    """A named way down from noise.

    `keeps` names the estimate that its history holds: "x0", "eps" for methods over slopes (LMS, PLMS), or "either",
    to try both. `aliases` are its names elsewhere, `diffusers` the class that it equals. `calls` is network calls a
    step. `refuses` are settings of scheduler_config.json that it cannot follow, with the reasons. A scheduler that is
    `refused` cannot run at all, and this says why: a job that names it is told so, not that the name is unknown.
    """

    name: str
    sampler: Sampler
    levels: LevelMaker = on_sigmas
    keeps: Keeps | Literal["either"] = "x0"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    preset: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    diffusers: str = ""
    calls: int = 1
    refuses: Mapping[tuple[str, Any], str] = field(default_factory=lambda: NOT_BUILT)
    refused: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Every option that it takes, with the value that it has when nobody says anything."""
        found = {**keyword_defaults(self.levels), **keyword_defaults(self.sampler)}
        for name in [*self.defaults, *self.preset]:
            if name not in found:
                raise UsageError(f"scheduler {self.name!r}: has no option {name!r}; have {', '.join(found)}")
        return {**found, **self.defaults, **self.preset}

    def program(
        self, schedule: NoiseSchedule | Mapping[str, Any], steps: int, begin: int = 0, **options: Any
    ) -> Program:
        """The table of a walk of `steps` steps, the first `begin` skipped; the history starts afresh there.

        `options` of None or "" mean "as the checkpoint says". The last thousand programs are kept, by the
        identity of `schedule`. Raises UsageError: unknown options or values, a sampler that is not linear.
        """
        if self.refused:
            raise UsageError(f"scheduler {self.name!r} cannot run as a table: {self.refused}")
        if isinstance(schedule, Mapping):
            schedule = NoiseSchedule.from_config(schedule)
        given = {k: v for k, v in options.items() if v is not None and v != ""}
        return build(self, schedule, steps, begin, tuple(sorted(given.items())))

    def resolved(self, schedule: NoiseSchedule, given: Mapping[str, Any]) -> dict[str, Any]:
        """The value of every option: job over preset over checkpoint over class. Raises UsageError."""
        known = self.options
        for name in given:
            if name not in known:
                raise UsageError(
                    f"sampler.{name}: scheduler {self.name!r} has no such option; have {', '.join(known)}"
                )
        for (key, value), reason in self.refuses.items():
            if schedule.config.get(key) == value:
                raise UsageError(f"scheduler_config.json: {key}: {value!r}: {reason}; take this setting out")
        read = {k: v for k, v in config_options(schedule.config).items() if k in known}
        return {**known, **read, **self.preset, **given}


def keyword_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only parameters and their defaults: the options of a sampler or a level maker."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def config_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json in the words of our options (other keys as they are; null means absent)."""
    said = {k: v for k, v in config.items() if v is not None}
    renamed = {ours: said[theirs] for ours, theirs in CONFIG_KEYS.items() if theirs in said}
    bends = [word for flag, word in SIGMA_FLAGS.items() if said.get(flag)]
    return {**said, **renamed, **({"sigmas": bends[0]} if bends else {})}


@lru_cache(maxsize=1000)
def build(
    scheduler: Scheduler, schedule: NoiseSchedule, steps: int, begin: int, given: tuple[tuple[str, Any], ...]
) -> Program:
    """`Scheduler.program`, remembered: tracing takes milliseconds, and a job's rows repeat their settings."""
    options = scheduler.resolved(schedule, dict(given))
    ours = {k: options[k] for k in keyword_defaults(scheduler.levels)}
    levels = scheduler.levels(schedule, steps, begin, **ours)
    theirs = {k: options[k] for k in keyword_defaults(scheduler.sampler)}
    return trace(
        scheduler.name, scheduler.sampler, levels, schedule.prediction_type, scheduler.keeps, **theirs
    )


@lru_cache(maxsize=1000)
def with_sigmas(scheduler: Scheduler, word: str) -> Scheduler:
    """The scheduler on another sigma schedule: what "DPM++ 2M Karras" means."""
    preset = {**scheduler.preset, "sigmas": word}
    return replace(scheduler, name=f"{scheduler.name}_{word}", diffusers="", preset=preset)
