"""Latents down their programs: one line of numbers for each row, one fused update for all of them.

    x, x_prev, history, output, noise  ->  x, x_prev, history          (`program` says by which formula)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from batchsd.diffusion.levels import Level
from batchsd.diffusion.program import HISTORY, NOISES, Program
from batchsd.diffusion.schedule import clean_coefficients, noise_coefficients

Network = Callable[[torch.Tensor, float], torch.Tensor]
"""(scaled latents, timestep) -> the guided output."""


class Lines(NamedTuple):
    """One line of numbers for each of R rows: [R] each, b [R, 5], c [R, 2]."""

    timestep: torch.Tensor
    in_scale: torch.Tensor
    c_skip: torch.Tensor
    c_out: torch.Tensor
    a: torch.Tensor
    a_prev: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    call_sigma: torch.Tensor


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. A GPU gets it through pinned memory: this process does not wait for what it draws."""
    if device.type == "cuda" and x.device.type == "cpu" and x.numel():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def gather(
    programs: Sequence[Program],
    positions: Sequence[int],
    device: torch.device = torch.device("cpu"),  # noqa: B008 (a constant)
    dtype: torch.dtype = torch.float32,
) -> Lines:
    """The line at positions[r] of programs[r] for each row r: one array, one copy to the device."""
    rows = np.stack([p.packed[i] for p, i in zip(programs, positions, strict=True)])
    t = sent(torch.from_numpy(rows).to(dtype), device)
    single, b, c, rest = t.split([6, HISTORY, NOISES, 3], dim=1)
    return Lines._make([*single.unbind(1), b, c, *rest.unbind(1)])


def along(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Shape factor [R, ...] to multiply x [R, ..., any trailing dimensions]."""
    return factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))


def update(
    lines: Lines,
    x: torch.Tensor,
    x_prev: torch.Tensor,
    history: torch.Tensor,
    out: torch.Tensor,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of every row: (x, x_prev, history) after the call that gave the guided `out`.

    x, x_prev, out [R, ...]; history [R, 5, ...], lag 0 first; noise [R, 2, ...], None where no row draws. A
    row's x_prev, history and noise must start as zeros: what it does not use is still multiplied by 0.
    """
    h = along(lines.c_skip, x) * x + along(lines.c_out, out) * out
    history = torch.cat([h[:, None], history[:, : HISTORY - 1]], dim=1)
    moved = along(lines.a, x) * x + along(lines.a_prev, x) * x_prev
    # Term by term: how torch splits a sum depends on the number of rows, and with it the last bits.
    for k in range(HISTORY):
        moved = moved + along(lines.b[:, k], x) * history[:, k]
    if noise is not None:
        for j in range(NOISES):
            moved = moved + along(lines.c[:, j], x) * noise[:, j]
    return moved, x, history


def run_program(
    program: Program, network: Network, x: torch.Tensor, noise: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Walk one latent x (any shape) through a program, in x's dtype; `noise()` draws."""
    x, x_prev = x[None], torch.zeros_like(x)[None]
    history = x.new_zeros(1, HISTORY, *x.shape[1:])
    for i in range(len(program)):
        line = gather([program], [i], x.device, x.dtype)
        out = network((along(line.in_scale, x) * x)[0], float(program.timesteps[i]))
        drawn = torch.zeros_like(history[:, :NOISES])
        for j in range(int(program.draws[i])):
            drawn[0, j] = noise()
        x, x_prev, history = update(line, x, x_prev, history, out[None], drawn)
    return x[0]


# -- running the function itself


@dataclass(frozen=True)
class NetworkDenoise:
    """`Denoise` on real tensors."""

    network: Network
    prediction_type: str

    def output(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        return self.network(x / math.hypot(level.alpha, level.sigma), level.timestep)

    def __call__(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        skip, out = clean_coefficients(self.prediction_type, level.alpha, level.sigma)
        return skip * x + out * self.output(x, level)

    def eps(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        skip, out = noise_coefficients(self.prediction_type, level.alpha, level.sigma)
        return skip * x + out * self.output(x, level)
