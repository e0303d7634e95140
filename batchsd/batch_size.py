"""`batch_size = "auto"`: as many lanes as fit into memory and make the network faster, no more.

    lanes = 0.8 free / (peak of two lanes - peak of one)        then doubled from 1 while lanes a second still rise

Measured once a latent size; where not even a lane fits, the rows say so when they are drawn. On a CPU memory is not
the limit and the gain ends early: `CPU_LANES`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from batchsd.model.checkpoint import Model
from batchsd.network import give_back, out_of_memory

# Pictures a CPU second at 64 px with the shipped model: see tests/bench/bench_mixed.py --lanes.
CPU_LANES = 16

MOST_LANES = 128
_SHARE = 0.8  # of the free memory: the VAE, other sizes and fragmentation want theirs
_GAIN = 1.05  # lanes a second, for twice the lanes: less is not worth the memory


def measured_lanes(model: Model, size: Sequence[int]) -> int:
    """Lanes a network call for latents of (C, H, W) on the model's device."""
    if model.device.type != "cuda":
        return CPU_LANES
    try:
        return _measured(model, size)
    except Exception as error:
        if not out_of_memory(error):
            raise
    give_back(model.device)  # here: until the error is gone, it holds what it could not add to
    return 1


def _measured(model: Model, size: Sequence[int]) -> int:
    call = one_call(model, size)

    def peak(lanes: int) -> int:
        torch.cuda.reset_peak_memory_stats(model.device)
        call(lanes)
        return torch.cuda.max_memory_allocated(model.device)

    def seconds(lanes: int) -> float:
        began = time.perf_counter()
        call(lanes)
        return time.perf_counter() - began

    call(1)  # the first call also loads kernels
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(model.device)[0]
    # The VAE decodes at the same time: a picture's worth is kept for it; where more do not fit it halves its batch.
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    model.decode(torch.zeros(1, *size, device=model.device))
    decoding = torch.cuda.max_memory_allocated(model.device) - before
    return best_lanes(room(free - decoding, peak(1), peak(2)), seconds)


def room(free: int, peak_of_one: int, peak_of_two: int) -> int:
    """How many lanes fit into `free` bytes, from the memory that one lane and two lanes needed at their peak."""
    a_lane = max(1, peak_of_two - peak_of_one)
    return max(1, int(_SHARE * max(0, free) / a_lane))


def best_lanes(most: int, seconds: Callable[[int], float]) -> int:
    """The number of lanes, a power of two up to `most`, where lanes a second stop rising.

    A call that runs out of memory all the same is as good as the limit.
    """
    lanes, rate = 1, 0.0
    while lanes <= min(most, MOST_LANES):
        try:
            seconds(lanes)  # a new shape: kernels are chosen and memory is taken
            now = lanes / min(seconds(lanes), seconds(lanes))
        except Exception as error:
            if not out_of_memory(error):
                raise
            break
        if now < _GAIN * rate:
            break
        lanes, rate = 2 * lanes, now
    return max(1, lanes // 2)


def one_call(model: Model, size: Sequence[int]) -> Callable[[int], None]:
    """The network on zeros: lanes of latents (C, H, W), with all that a model of its kind is told."""
    config, channels = model.unet.config, size[0] + model.extra_channels
    length, width = model.text.length, config.context_dim
    told = {"timestep_cond": config.guidance_dim}
    if model.takes_sizes:
        told |= {"time_ids": 6, "text_embeds": config.added_dim - 6 * config.added_time_dim}

    @torch.no_grad()
    def call(lanes: int) -> None:
        x = torch.zeros(lanes, channels, *size[1:], device=model.device, dtype=model.dtype)
        context = torch.zeros(lanes, length, width, device=model.device, dtype=model.dtype)
        x = x.to(memory_format=torch.channels_last)
        added = {name: torch.zeros(lanes, numbers, device=model.device) for name, numbers in told.items() if numbers}
        model.unet(x, torch.zeros(lanes, device=model.device), context, None, added)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    return call
