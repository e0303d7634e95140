"""A sampler is written as a function and runs as a table.

Every sampler of the field is linear in the latent, the network's outputs and the noise, so that from one
network call to the next

    h_i     = c_skip x_i + c_out output_i                      (x_0 or eps, whichever the sampler keeps)
    x_{i+1} = a x_i + a_prev x_{i-1} + sum_k b_k h_{i-k} + sum_j c_j noise_j

`trace` runs the function once on symbols, vectors over {x, h_0, h_1, ..., n_0, n_1, ...}, and reads these
numbers off: a `Program`. Rows at different places of different programs then share one `update`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from batchsd.diffusion.levels import CLEAN, Level, Levels
from batchsd.diffusion.samplers import Sampler
from batchsd.diffusion.schedule import clean_coefficients, noise_coefficients
from batchsd.types import UsageError

HISTORY = 5
"""Network outputs that a line may reach back over, this call's included: PLMS needs lags 0, 1, 2 and 4."""

NOISES = 2
"""Noise tensors that a line may use."""

TOLERANCE = 1e-11
"""What a line may leave over, relative to its largest coefficient: rounding, not a term."""

Keeps = Literal["x0", "eps"]
Network = Callable[[torch.Tensor, float], torch.Tensor]
"""(scaled latents, timestep) -> the guided output."""


@dataclass(frozen=True, eq=False)
class Program:
    """A walk as a table: float64 arrays with a line for each of its N network calls.

    The network sees in_scale * x at `timesteps`. `alpha`, `sigma` is the level reached after the call, where a
    blend mixes alpha * clean + sigma * noise in (the next call's level, mid-stages too; after the last call
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
    b, c = t[:, 6 : 6 + HISTORY], t[:, 6 + HISTORY : 6 + HISTORY + NOISES]
    return Lines(*t[:, :6].unbind(1), b, c, *t[:, 6 + HISTORY + NOISES :].unbind(1))


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
    moved = along(lines.a, x) * x + along(lines.a_prev, x) * x_prev + (along(lines.b, history) * history).sum(1)
    if noise is not None:
        moved = moved + (along(lines.c, noise) * noise).sum(1)
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


# -- tracing


class Nonlinear(Exception):
    """A sampler did to a latent what no table can hold; the message says what."""


class Symbol:
    """A latent as a vector of coefficients over {x, h_0, h_1, ..., n_0, n_1, ...}, in order of appearance."""

    __slots__ = ("vector",)
    __array_ufunc__ = None  # numpy numbers leave `number * symbol` to us

    def __init__(self, vector: np.ndarray) -> None:
        self.vector = vector

    def __add__(self, other: Any) -> Symbol:
        if isinstance(other, Symbol):
            size = max(len(self.vector), len(other.vector))
            return Symbol(padded(self.vector, size) + padded(other.vector, size))
        if is_number(other) and other == 0:  # sum() starts from 0
            return self
        raise Nonlinear("adds a constant to a latent")

    __radd__ = __add__

    def __mul__(self, other: Any) -> Symbol:
        if not is_number(other):
            raise Nonlinear("multiplies latents with each other")
        return Symbol(self.vector * float(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Symbol:
        if not is_number(other):
            raise Nonlinear("divides by a latent")
        return Symbol(self.vector / float(other))

    def __rtruediv__(self, other: Any) -> Symbol:
        raise Nonlinear("divides by a latent")

    def __neg__(self) -> Symbol:
        return self * -1.0

    def __sub__(self, other: Any) -> Symbol:
        return self + (-other)

    def __rsub__(self, other: Any) -> Symbol:
        return -self + other

    def __pow__(self, other: Any) -> Symbol:
        raise Nonlinear("raises a latent to a power")

    def compare(self, other: Any = None) -> bool:
        raise Nonlinear("compares latents, so that its path depends on the picture (an adaptive step size?)")

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = compare  # type: ignore[assignment]
    __bool__ = __float__ = __int__ = __abs__ = compare  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise Nonlinear(f"uses '{name}' of a latent (thresholding, norms and shapes have no place in a table)")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Nonlinear(f"applies torch.{getattr(function, '__name__', function)} to a latent")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number))


def padded(vector: np.ndarray, size: int) -> np.ndarray:
    return vector if len(vector) == size else np.pad(vector, (0, size - len(vector)))


class Tracer:
    """`Denoise` and noise on symbols; remembers where the network was called and what was drawn."""

    def __init__(self, keeps: Keeps) -> None:
        self.keeps = keeps
        self.size = 1
        self.calls: list[tuple[np.ndarray, Level]] = []
        self.outputs: list[int] = []  # index of h_i
        self.drawn: list[list[int]] = []  # indices of the noises drawn after call i

    def fresh(self) -> tuple[int, Symbol]:
        index, self.size = self.size, self.size + 1
        return index, Symbol(np.eye(1, self.size, index)[0])

    def output(self, x: Any, level: Level) -> Symbol:
        if not isinstance(x, Symbol):
            raise Nonlinear("calls the network on something that is not made from x")
        index, h = self.fresh()
        self.calls.append((x.vector, level))
        self.outputs.append(index)
        self.drawn.append([])
        return h

    def __call__(self, x: Symbol, level: Level) -> Symbol:
        h = self.output(x, level)
        return h if self.keeps == "x0" else (x - level.sigma * h) / level.alpha

    def eps(self, x: Symbol, level: Level) -> Symbol:
        h = self.output(x, level)
        return h if self.keeps == "eps" else (x - level.alpha * h) / level.sigma

    def noise(self) -> Symbol:
        if not self.drawn:
            raise Nonlinear("draws noise before its first network call")
        index, n = self.fresh()
        self.drawn[-1].append(index)
        if len(self.drawn[-1]) > NOISES:
            raise Nonlinear(f"draws more than {NOISES} noises between two network calls")
        return n


def trace(
    name: str, sampler: Sampler, levels: Levels, prediction_type: str, keeps: Keeps, **options: Any
) -> Program:
    """Run `sampler` once on symbols and write down its table.

    `keeps` says which estimate its history holds. Raises UsageError, naming the sampler and the reason, if
    a line cannot say what it does.
    """
    tracer = Tracer(keeps)
    try:
        last = sampler(tracer, Symbol(np.ones(1)), levels, tracer.noise, **options)
        if not isinstance(last, Symbol) or not tracer.calls:
            raise Nonlinear("returns no latent that it made from the network's outputs")
        if not is_start(tracer.calls[0][0]):
            raise Nonlinear("moves x before its first network call")
        lines = [read_line(tracer, i, padded(last.vector, tracer.size)) for i in range(len(tracer.calls))]
    except Nonlinear as reason:
        raise UsageError(
            f"scheduler {name!r} cannot run as a table: {sampler_name(sampler)} {reason}. A sampler must be linear in "
            "x, the network's outputs and the noise"
        ) from None
    return assemble(tracer, lines, levels, prediction_type)


def is_start(vector: np.ndarray) -> bool:
    return bool(vector[0] == 1 and not vector[1:].any())


def sampler_name(sampler: Sampler) -> str:
    return getattr(inspect.unwrap(sampler), "__name__", "its function")


def read_line(tracer: Tracer, i: int, last: np.ndarray) -> np.ndarray:
    """[a, a_prev, b[5], c[2]] of the way from call i to the next, or to `last`.

    Coefficients of h within reach and of this call's noise are free; all older ones (x, older h and noise)
    must come out as a multiple of x_i, or as a mix of x_i and x_{i-1}. a_prev is used only where it is needed.
    """
    target = padded(tracer.calls[i + 1][0], tracer.size) if i + 1 < len(tracer.calls) else last
    here = padded(tracer.calls[i][0], tracer.size)
    before = padded(tracer.calls[i - 1][0], tracer.size) if i else np.zeros(tracer.size)
    if not np.isfinite(target).all():
        raise Nonlinear(f"has an infinite coefficient at network call {i + 1}")
    lags, drawn = tracer.outputs[max(0, i - HISTORY + 1) : i + 1][::-1], tracer.drawn[i]
    old = np.ones(tracer.size, bool)
    old[lags + drawn] = False

    enough = TOLERANCE * np.abs(target).max()
    a, a_prev = multiple(target[old], here[old], np.abs(here).max()), 0.0
    if np.abs(target[old] - a * here[old]).max() > enough:
        a, a_prev = np.linalg.lstsq(np.stack([here[old], before[old]], 1), target[old], rcond=None)[0]
    rest = target - a * here - a_prev * before
    if np.abs(rest[old]).max() > enough:
        raise Nonlinear(
            f"needs more at network call {i + 1} than x, the x before it, the last {HISTORY} estimates and the "
            "noise just drawn (if it keeps slopes (x - x0) / sigma, register it with keeps='eps')"
        )
    line = np.zeros(2 + HISTORY + NOISES)
    line[:2] = a, a_prev
    line[2 : 2 + len(lags)] = rest[lags]
    line[2 + HISTORY : 2 + HISTORY + len(drawn)] = rest[drawn]
    line[np.abs(line) < 1e-14 * np.abs(line).max()] = 0.0  # rounding
    return line


def multiple(target: np.ndarray, here: np.ndarray, scale: float) -> float:
    """The factor a that brings a * here closest to target; 0 where `here` is but rounding beside `scale`."""
    return float(here @ target / (here @ here)) if np.abs(here).max() > 1e-14 * scale else 0.0


def assemble(tracer: Tracer, lines: list[np.ndarray], levels: Levels, prediction_type: str) -> Program:
    """The program of the traced calls: network scalings by level, lines, and the levels reached."""
    table = np.array(lines)
    called = [level for _, level in tracer.calls]
    reached = [*called[1:], CLEAN]
    to_h = clean_coefficients if tracer.keeps == "x0" else noise_coefficients
    scalings = np.array([to_h(prediction_type, level.alpha, level.sigma) for level in called])
    return Program(
        timesteps=np.array([level.timestep for level in called]),
        in_scale=np.array([1 / math.hypot(level.alpha, level.sigma) for level in called]),
        c_skip=scalings[:, 0],
        c_out=scalings[:, 1],
        a=table[:, 0],
        a_prev=table[:, 1],
        b=table[:, 2 : 2 + HISTORY],
        c=table[:, 2 + HISTORY :],
        alpha=np.array([level.alpha for level in reached]),
        sigma=np.array([level.sigma for level in reached]),
        call_sigma=np.array([level.ratio for level in called]),
        draws=np.array([len(drawn) for drawn in tracer.drawn]),
        init_noise=levels.init_noise,
        init_alpha=called[0].alpha,
        init_sigma=called[0].sigma,
    )
