"""A sampler is written as a function and runs as a table.

Every sampler of the field is linear in the latent, the network's outputs and the noise, so that from one
network call to the next

    h_i     = c_skip x_i + c_out output_i                      (x_0 or eps, whichever the sampler keeps)
    x_{i+1} = a x_i + a_prev x_{i-1} + sum_k b_k h_{i-k} + sum_j c_j noise_j

A `Program` holds these numbers for a walk (`tracing` reads them off the function), and rows at different
places of different programs share one `update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from batchsd.diffusion.levels import Level
from batchsd.diffusion.schedule import clean_coefficients, noise_coefficients

HISTORY = 5
"""Network outputs that a line may reach back over, this call's included: PLMS needs lags 0, 1, 2 and 4."""

NOISES = 2
"""Noise tensors that a line may use."""

Network = Callable[[torch.Tensor, float], torch.Tensor]
"""(scaled latents, timestep) -> the guided output."""


@dataclass(frozen=True, eq=False)
class Program:
    """A walk as a table: float64 arrays with a line for each of its N network calls.

    The network sees in_scale * x at `timesteps`. `alpha`, `sigma` is the level reached after the call, where
    a blend mixes alpha * clean + sigma * noise in (the next call's level, mid-stages too; after the last call
    it is clean). `call_sigma` is k-diffusion's sigma at the call. In a call the row's generator gives
    `draws` tensors of latent shape, c[:, j] being the factor of the j-th (0: drawn and left unused).
    A walk starts from init_noise * noise, or from init_alpha * clean + init_sigma * noise.
    """

    timesteps: np.ndarray
    in_scale: np.ndarray
    c_skip: np.ndarray
    c_out: np.ndarray
    a: np.ndarray
    a_prev: np.ndarray
    b: np.ndarray
    c: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    call_sigma: np.ndarray
    draws: np.ndarray
    init_noise: float
    init_alpha: float
    init_sigma: float

    def __len__(self) -> int:
        """N, the number of network calls."""
        return len(self.timesteps)

    @cached_property
    def packed(self) -> np.ndarray:
        """The lines side by side, float64 [N, 16], in the order of `Lines`."""
        singles = (self.timesteps, self.in_scale, self.c_skip, self.c_out, self.a, self.a_prev)
        return np.column_stack([*singles, self.b, self.c, self.alpha, self.sigma, self.call_sigma])


def still() -> Program:
    """A walk of no steps from a clean latent: it ends where it starts."""
    none = np.zeros(0)
    singles = dict.fromkeys(("timesteps", "in_scale", "c_skip", "c_out", "a", "a_prev"), none)
    tables = {"b": np.zeros((0, HISTORY)), "c": np.zeros((0, NOISES)), "draws": np.zeros(0, int)}
    levels = {"alpha": none, "sigma": none, "call_sigma": none}
    return Program(**singles, **tables, **levels, init_noise=0.0, init_alpha=1.0, init_sigma=0.0)


# -- the fused update


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


def gather(
    programs: Sequence[Program],
    positions: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Lines:
    """The line at positions[r] of programs[r] for each row r: one array, one copy to the device."""
    rows = np.stack([p.packed[i] for p, i in zip(programs, positions, strict=True)])
    t = torch.from_numpy(rows).to(dtype).to(device)
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
