"""A sampler is written as a function and runs as a table.

Every sampler of the field is linear in the latent, the network's outputs and the noise, so that from one
network call to the next

    h_i     = c_skip x_i + c_out output_i                      (x_0 or eps, whichever the sampler keeps)
    x_{i+1} = a x_i + a_prev x_{i-1} + sum_k b_k h_{i-k} + sum_j c_j noise_j

A `Program` holds these numbers for a walk (`tracing` reads them off the function), and rows at different
places of different programs share one update (`walk`). Numbers alone: no torch, which is slow to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

HISTORY = 5
"""Network outputs that a line may reach back over, this call's included: PLMS needs lags 0, 1, 2 and 4."""

NOISES = 2
"""Noise tensors that a line may use."""


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
