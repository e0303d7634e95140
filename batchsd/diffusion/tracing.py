"""From a sampler's function to its table: run once on symbols, and read the numbers off.

A symbol is a vector of coefficients over {x, h_0, h_1, ..., n_0, n_1, ...}: the start, the network's
estimates and the noises, in order of appearance. The point where call i + 1 asks the network, less what the
last estimates and the noise just drawn account for, must be a multiple of the point of call i (or a mix of
that and the point before): then the function is a `Program`, else it is refused with the reason.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from batchsd.diffusion.levels import CLEAN, Level, Levels
from batchsd.diffusion.program import HISTORY, NOISES, Program
from batchsd.diffusion.samplers import Sampler
from batchsd.diffusion.schedule import clean_coefficients, noise_coefficients
from batchsd.types import UsageError

TOLERANCE = 1e-11
"""What a line may leave over, relative to its largest coefficient: rounding, not a term."""

Keeps = Literal["x0", "eps"]
KEEPS: tuple[Keeps, ...] = ("x0", "eps")


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
        raise Nonlinear(f"uses '{name}' of a latent (no table holds thresholds, norms or shapes)")

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
    name: str, sampler: Sampler, levels: Levels, prediction_type: str, keeps: Keeps | Literal["either"], **options: Any
) -> Program:
    """Run `sampler` once on symbols and write down its table.

    `keeps` says which estimate its history holds; "either" tries both. Raises UsageError, naming the sampler and the
    reason, if a line cannot say what it does.
    """
    reasons = []
    for kept in KEEPS if keeps == "either" else (keeps,):
        tracer = Tracer(kept)
        try:
            lines = read_lines(tracer, sampler, levels, options)
        except Nonlinear as reason:
            reasons.append(reason)
            continue
        return assemble(tracer, lines, levels, prediction_type)
    raise UsageError(
        f"scheduler {name!r} cannot run as a table: {sampler_name(sampler)} {reasons[0]}. "
        "A sampler must be linear in x, the network's outputs and the noise"
    )


def read_lines(tracer: Tracer, sampler: Sampler, levels: Levels, options: Mapping[str, Any]) -> list[np.ndarray]:
    """Walk the sampler on symbols, and read each call's line. Raises Nonlinear."""
    last = sampler(tracer, Symbol(np.ones(1)), levels, tracer.noise, **options)
    if not isinstance(last, Symbol) or not tracer.calls:
        raise Nonlinear("returns no latent that it made from the network's outputs")
    if not is_start(tracer.calls[0][0]):
        raise Nonlinear("moves x before its first network call")
    return [read_line(tracer, i, padded(last.vector, tracer.size)) for i in range(len(tracer.calls))]


def is_start(vector: np.ndarray) -> bool:
    return bool(vector[0] == 1 and not vector[1:].any())


def sampler_name(sampler: Sampler) -> str:
    return getattr(inspect.unwrap(sampler), "__name__", "its function")


def read_line(tracer: Tracer, i: int, last: np.ndarray) -> np.ndarray:
    """[a, a_prev, b[5], c[2]] of the way from call i to the next, or to `last`.

    Coefficients of h within reach and of this call's noise are free; all older ones (x, older h and noise)
    must come out as a multiple of x_i, or as a mix of x_i and x_{i-1}. a_prev stays 0 where it is not needed.
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
            f"needs more at network call {i + 1} than x, the x before it, the last {HISTORY} estimates and "
            "the noise just drawn (if it keeps slopes (x - x0) / sigma, register it with keeps='eps')"
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
