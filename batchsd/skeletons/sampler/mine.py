"""The sampler `mine`, a walk from noise down to a picture; here Euler's, with part of the noise drawn anew each step.

It runs once on stand-ins for latents and becomes a table, so it only adds latents and multiplies them by numbers.
"""

from __future__ import annotations

from typing import Any

from batchsd import Levels, Scheduler, hookimpl


def walk(denoise: Any, x: Any, levels: Levels, noise: Any, *, eta: float = 0.2) -> Any:
    """denoise.eps(x, level) is the network's noise, denoise(x, level) its clean estimate: one call each. noise() draws.

    Keyword parameters are options: a job's `sampler.eta` is this one.
    """
    for here, there in levels:
        down = there.sigma * (1 - eta**2) ** 0.5
        x = x + (down - here.sigma) * denoise.eps(x, here)
        x = x + there.sigma * eta * noise()
    return x


@hookimpl
def register_schedulers() -> dict[str, Scheduler]:
    return {"mine": Scheduler("mine", walk)}
