"""From noise to picture: rows of a run drawn again from its folder alone, looked at on the way.

At each call the network's output and the latents give the picture that it believes in,

    x_0 = c_skip x + c_out output            (`schedule.clean_coefficients` at the call's alpha and sigma)

and `SHOWN` of these estimates are decoded. The walk is the engine's own: nothing in it knows that it is watched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchsd.diffusion.schedule import clean_coefficients
from batchsd.lock import gone, read_lock
from batchsd.progress import duration
from batchsd.reproduce import Found, Run, difference, pixels_of
from batchsd.reread import WrittenShard
from batchsd.types import BatchsdError, Request, RowError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from batchsd.engine import Engine
    from batchsd.lanes import Lanes, Row

SHOWN = 8  # estimates of a strip, evenly over its calls
TIMED = 2  # calls after which the rest is estimated: the first one warms up


class TooSlow(Exception):
    """This machine would take longer than it was given."""


@dataclass(frozen=True, slots=True)
class Strip:
    """What a row began with, what was believed of it, and its picture: (label, uint8 H W 3) each.

    `apart` is the largest difference to the run's own picture, of 255; None where that was not kept to the bit.
    """

    frames: Sequence[tuple[str, np.ndarray]]
    calls: int
    apart: int | None


def strips(
    run: str, places: Sequence[tuple[WrittenShard, int]], seconds: float | None
) -> Iterator[Strip | str]:
    """The strip of each of `places`, or the reason why it has none; all within about `seconds`, where given.

    Raises BatchsdError where no row can be drawn here.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    opened = Run(run)
    holder = read_lock(opened.store)
    if holder is not None and not gone(holder):
        raise BatchsdError("the run is at work, and so is its device")
    plan = places[0][0].plan
    engine = opened.recipe(plan).engine(opened.registry)
    for shard, index in places:
        found = opened.at(shard.plan, shard.marker, shard.shard, index)
        try:
            yield strip(engine, opened.request(found), found, deadline)
        except (BatchsdError, RowError, TooSlow) as error:
            yield str(error)


def strip(engine: Engine, request: Request, found: Found, deadline: float | None) -> Strip:
    """Draw one row alone. Raises RowError, and TooSlow where it would not be done by `deadline` (monotonic)."""
    row = engine.condition(found.shard, request)
    calls = len(row.program)
    if not calls:
        raise RowError("error", "nothing of it was denoised (strength 0)")
    engine.add_contexts([row])
    lanes = engine.new_lanes(engine.group(row))
    lanes.admit(row)
    frames = [("start", lanes.x_RCHW * float(row.program.in_scale[0]))]
    wanted = {round(i * (calls - 1) / SHOWN) for i in range(SHOWN)}
    began = time.monotonic()
    while True:
        call = row.position
        believed, latents = step(engine, lanes, row)
        if latents is not None:
            frames.append(("picture", latents))
            break
        if call in wanted and believed is not None:
            frames.append((f"call {call + 1}", believed))
        if call + 1 == TIMED and deadline is not None:
            whole = (time.monotonic() - began) / TIMED * calls
            if began + whole > deadline:
                raise TooSlow(f"a row would take about {duration(whole)} here ({engine.device.type})")
    pictures = [(label, engine.decode(latents_1CHW)[0][0]) for label, latents_1CHW in frames]
    if row.conditioning.kept is not None:
        pictures[-1] = ("picture", row.conditioning.kept.into(pictures[-1][1]))
    stored = (found.row.ours["image"] or {}).get("bytes") or b""
    kept = stored.startswith(b"\x89PNG")
    return Strip(pictures, calls, difference(pixels_of(stored), pictures[-1][1]).largest if kept else None)


def step(engine: Engine, lanes: Lanes, row: Row) -> tuple[Tensor | None, Tensor | None]:
    """One call of a row that walks alone: (the clean latents that the network believes in, None), or (None, its last).

    Both are (1, C, H, W). Raises RowError where the network failed.
    """
    program, call, x_1CHW = row.program, row.position, lanes.x_RCHW
    stepped = lanes.step()
    for _, error in stepped.failed:
        raise error
    if stepped.finished:
        return None, stepped.finished[0][1][None]
    sigma = float(program.call_sigma[call])
    level = (0.0, 1.0) if math.isinf(sigma) else (1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))
    h_1CHW = lanes.history_RhCHW[:, 0]  # c_skip x + c_out output, in the sampler's own terms
    out_1CHW = (h_1CHW - float(program.c_skip[call]) * x_1CHW) / float(program.c_out[call])
    skip, out = clean_coefficients(engine.schedule.prediction_type, *level)
    return skip * float(program.in_scale[call]) * x_1CHW + out * out_1CHW, None
