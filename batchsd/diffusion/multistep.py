"""Multistep samplers: one network call a step, and the estimates of earlier calls bend the step.

Each takes the estimate as a polynomial over the last few calls and integrates it exactly,

    x_t = e^(..) x_s + sum_j h_j * integral of L_j(u) e^(rate u) du

over sigma (LMS), log sigma (DEIS) or the log SNR lambda (DPM-Solver++, UniPC, SA-Solver). Where the history
is still short, at the start of a walk, the order is lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from batchsd.diffusion.levels import Level, Levels
from batchsd.diffusion.samplers import Denoise, Noise, State
from batchsd.types import UsageError

Past = list[tuple[float, State]]
"""(time, estimate) of each call so far; what the time is, is the method's own."""

NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
"""Gauss-Legendre: exact for LMS's cubics, to rounding for the exponential ones."""


def lagrange_integrals(times: Sequence[float], start: float, end: float, rate: float = 0.0) -> list[float]:
    """For each j the integral from start to end of L_j(u) e^(rate (u - end)) du, L_j(times[k]) = [j = k]."""
    half = (end - start) / 2
    u = start + half * (NODES + 1)
    pull = half * WEIGHTS * np.exp(rate * (u - end))
    found = []
    for j, tj in enumerate(times):
        basis = np.prod([(u - tk) / (tj - tk) for k, tk in enumerate(times) if k != j], axis=0)
        found.append(float(np.sum(pull * basis)))
    return found


def weighted(weights: Sequence[float], past: Past) -> State:
    """sum_j weights[j] h_j, the last call's estimate first."""
    return sum(w * h for w, (_, h) in zip(weights, reversed(past), strict=True))


def plms(denoise: Denoise, x: State, levels: Levels, noise: Noise) -> State:
    """PNDM without its Runge-Kutta warm-up (Liu et al., 2022): Adams-Bashforth on eps.

    The levels (`levels.by_plms`) hold the first step twice: its second call tries the end of the first again
    with the mean of both slopes.
    """

    def transfer(x: State, eps: State, here: Level, there: Level) -> State:
        kept = there.alpha / here.alpha
        return kept * x + (there.sigma - kept * here.sigma) * eps

    bashforth = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    past: Past = []
    first = x
    for i, (here, there) in enumerate(levels):
        if i == 1:
            again = denoise.eps(x, there)
            x = transfer(first, (past[0][1] + again) / 2, here, there)
        else:
            past = [*past[-3:], (here.timestep, denoise.eps(x, here))]
            x = transfer(x, weighted(bashforth[len(past) - 1], past), here, there)
    return x


def lms(denoise: Denoise, x: State, levels: Levels, noise: Noise, *, order: int = 4) -> State:
    """Linear multistep on the slope eps over sigma, of order 1 to 4 (k-diffusion's LMS)."""
    past: Past = []
    for here, there in levels:
        past = [*past, (here.sigma, denoise.eps(x, here))][-order:]
        times = [t for t, _ in reversed(past)]
        x = x + weighted(lagrange_integrals(times, here.sigma, there.sigma), past)
    return x


def deis(
    denoise: Denoise,
    x: State,
    levels: Levels,
    noise: Noise,
    *,
    order: int = 2,
    lower_order_final: bool = True,
) -> State:
    """DEIS (Zhang and Chen, 2022), "log rho": eps as a polynomial in log sigma, of order 1 to 3."""
    past: Past = []
    for i, (here, there) in enumerate(levels):
        past = [*past, (math.log(here.ratio), denoise.eps(x, here))][-order:]
        used = past[-final_order(levels, i, order, lower_order_final) :]
        if there.sigma == 0:
            weights = [-here.ratio]
        else:
            end = math.log(there.ratio)
            integrals = lagrange_integrals([t for t, _ in reversed(used)], math.log(here.ratio), end, 1.0)
            weights = [there.ratio * w for w in integrals]
        x = there.alpha / here.alpha * x + there.alpha * weighted(weights, used)
    return x


def final_order(levels: Levels, i: int, order: int, lower: bool, euler: bool = False) -> int:
    """The order of step i: 1 at the last if that ends clean or goes nowhere, or with `euler`.

    Below 15 steps, with `lower`, it is 1 at the last and at most 2 at the last but one.
    """
    left = len(levels) - i
    few = lower and levels.total < 15
    if left == 1 and (few or euler or ends_walk(levels.starts[-1], levels.ends[-1])):
        return 1
    return min(order, 2) if left == 2 and few else order


def ends_walk(here: Level, there: Level) -> bool:
    """Whether a step ends clean or goes nowhere (Karras to sigma_min is there already): order 1 at most."""
    return there.sigma == 0 or there.log_snr - here.log_snr < 1e-9


def dpmpp_multistep(
    denoise: Denoise,
    x: State,
    levels: Levels,
    noise: Noise,
    *,
    order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    eta: float = 1.0,
) -> State:
    """DPM-Solver++ multistep (Lu et al., 2022): an exponential integrator in x_0 over the log SNR.

    `order` 1 to 3; see `final_order` for the last steps.
    "sde-dpmsolver++" draws once a step: noise of strength `eta` in place of that share of the way
    (k-diffusion's 2M SDE and 3M SDE).
    """
    churn = {"dpmsolver++": 0.0, "deis": 0.0, "sde-dpmsolver++": eta}.get(algorithm_type)
    if churn is None:
        raise UsageError(f"sampler.algorithm_type: {algorithm_type!r} is not built; use 'dpmsolver++'")
    past: Past = []
    for i, (here, there) in enumerate(levels):
        past.append((here.log_snr, denoise(x, here)))
        now = final_order(levels, i, order, lower_order_final, euler_at_final)
        kept = math.exp(-churn * (there.log_snr - here.log_snr)) if churn else 1.0
        estimate = taylor_sum(past[-now:], there.log_snr, solver_type, 1 + churn)
        x = kept * there.sigma / here.sigma * x + there.alpha * estimate
        if algorithm_type == "sde-dpmsolver++":
            x = x + there.sigma * math.sqrt(1 - kept**2) * noise()
    return x


def taylor_sum(past: Past, end: float, solver_type: str, pull: float = 1.0) -> State:
    """The integral of pull e^(pull (lambda - end)) x_0(lambda) from the last call's log SNR to `end`.

    x_0 is taken as its Taylor polynomial with differences over `past`, one to three (log SNR, x_0), the
    last call last. At two, `solver_type` "midpoint" takes half the first weight for the second's ("heun").
    """
    lam0, m0 = past[-1]
    h = end - lam0
    phi1 = -math.expm1(-pull * h)
    if len(past) == 1:
        return phi1 * m0
    lam1, m1 = past[-2]
    r0 = (lam0 - lam1) / h
    slope = (m0 - m1) / r0
    phi2 = 1 - phi1 / (pull * h)
    if len(past) == 2:
        if solver_type not in ("midpoint", "heun", "logrho", "bh1", "bh2"):
            raise UsageError(f"sampler.solver_type: {solver_type!r} is unknown; have midpoint, heun")
        return phi1 * m0 + (phi2 if solver_type == "heun" else phi1 / 2) * slope
    lam2, m2 = past[-3]
    r1 = (lam1 - lam2) / h
    bend = (slope - (m1 - m2) / r1) / (r0 + r1)
    phi3 = phi2 / (pull * h) - 0.5
    return phi1 * m0 + phi2 * (slope + r0 * bend) - phi3 * bend


def unipc(
    denoise: Denoise,
    x: State,
    levels: Levels,
    noise: Noise,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
) -> State:
    """UniPC (Zhao et al., 2023), in x_0: each call first corrects the step that led to it, then predicts.

    `solver_type` is its B(h): "bh1" h, "bh2" e^h - 1. The order falls to 1 over the last steps.
    """
    bh1 = solver_type == "bh1"
    past: Past = []
    before, used = (x, levels.starts[0]), 0
    for i, (here, there) in enumerate(levels):
        m = denoise(x, here)
        if past:
            last_x, last = before
            x = unified_step(last_x, last, here, past, used, bh1, corrector=m)
        past.append((here.log_snr, m))
        left = len(levels) - i if lower_order_final else order
        used = 1 if ends_walk(here, there) else min(order, left, len(past))
        before = (x, here)
        x = unified_step(x, here, there, past, used, bh1)
    return x


def unified_step(
    x: State, here: Level, there: Level, past: Past, order: int, bh1: bool, corrector: State = None
) -> State:
    """UniP from `here` to `there`, or UniC where the estimate at `there` is given."""
    lam, m0 = past[-1]
    h = there.log_snr - lam
    x = there.sigma / here.sigma * x - there.alpha * math.expm1(-h) * m0
    differences = [(m - m0, (time - lam) / h) for time, m in past[-order:-1][::-1]]
    if corrector is not None:
        differences.append((corrector - m0, 1.0))
    if not differences:
        return x
    scale = -h if bh1 else math.expm1(-h)
    r = np.array([r for _, r in differences])
    phi, sizes = math.expm1(-h) / -h - 1, []
    for k in range(1, len(differences) + 1):
        sizes.append(phi * math.factorial(k) / scale)
        phi = phi / -h - 1 / math.factorial(k + 1)
    # the paper sets the weight of order 2's one difference to a half
    weights = np.linalg.solve(np.vander(r, increasing=True).T, sizes) if len(r) > 1 else np.array([0.5])
    return x - there.alpha * scale * sum(
        float(w) / q * d for w, (d, q) in zip(weights, differences, strict=True)
    )


def sa_solver(
    denoise: Denoise,
    x: State,
    levels: Levels,
    noise: Noise,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    lower_order_final: bool = True,
    eta: float = 1.0,
) -> State:
    """SA-Solver (Xue et al., 2023): stochastic Adams-Bashforth, then Adams-Moulton with the same noise.

    tau is `eta` at timesteps 200 to 800 and 0 elsewhere. One draw a step.
    """

    def adams(x: State, here: Level, there: Level, known: Past, draw: State, second: float) -> State:
        tau2 = eta**2 if 200 <= here.timestep <= 800 else 0.0
        rate, h = 1 + tau2, there.log_snr - here.log_snr
        weights = lagrange_integrals([t for t, _ in reversed(known)], here.log_snr, there.log_snr, rate)
        if len(known) == 2:
            # order 2 takes h^2 / 2 for the exact second weight, of which this is the difference
            gap = h**2 / 2 - (rate * h + math.expm1(-rate * h)) / rate**2
            weights = [weights[0] + gap / second, weights[1] - gap / second] if gap else weights
        kept = math.exp(-tau2 * h)
        x = kept * there.sigma / here.sigma * x + rate * there.alpha * weighted(weights, known)
        return x + there.sigma * math.sqrt(max(0.0, 1 - kept**2)) * draw

    past: Past = []
    last_x, last, draw = x, levels.starts[0], None
    for i, (here, there) in enumerate(levels):
        m = denoise(x, here)
        left = len(levels) - i
        if past:
            correct = min(corrector_order, left + 2 if lower_order_final else corrector_order, len(past) + 1)
            known = [*past, (here.log_snr, m)][-correct:]
            x = adams(last_x, last, here, known, draw, here.log_snr - last.log_snr)
        past.append((here.log_snr, m))
        draw, last_x, last = noise(), x, here
        if there.sigma == 0:
            x = there.alpha * m
            continue
        predict = min(predictor_order, left if lower_order_final else predictor_order, len(past))
        x = adams(x, here, there, past[-predict:], draw, here.log_snr - past[-2][0] if predict > 1 else 1.0)
    return x
