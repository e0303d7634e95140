"""Samplers on Gaussian data, where order, mean and variance are known; k-diffusion's way to write one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from batchsd.diffusion.builtin import BUILTIN
from batchsd.diffusion.levels import on_sigmas
from batchsd.diffusion.samplers import ancestral_split, from_k_diffusion
from batchsd.diffusion.scheduler import Scheduler, keyword_defaults
from batchsd.diffusion.tracing import trace
from batchsd.types import UsageError

from .gaussian import MEAN, SCHEDULE, SPREAD, flow_error, law, slope, smooth_levels, spread_at
from .oracle import BASE, by_table, relative

ORDERS = [
    # (scheduler, options, calls whose history is exact, nominal order)
    ("ddim", {}, 0, 1),
    ("euler", {}, 0, 1),
    ("heun", {}, 0, 2),
    ("dpm2", {}, 0, 2),
    ("dpmpp_2s", {}, 0, 2),
    ("dpmpp_2s", {"order": 3}, 0, 3),
    ("dpmpp_2s", {"order": 3, "solver_type": "heun"}, 0, 3),
    ("dpmpp_2s_a", {"eta": 0.0}, 0, 2),
    ("dpmpp_sde", {"eta": 0.0}, 0, 2),
    ("dpmpp_2m", {"order": 2}, 0, 2),
    ("dpmpp_2m", {"order": 2, "solver_type": "heun"}, 2, 2),
    ("dpmpp_3m", {"order": 3}, 0, 2),
    ("dpmpp_3m", {"order": 3}, 3, 3),
    ("deis", {"order": 2}, 0, 2),
    ("deis", {"order": 3}, 3, 3),
    ("lms", {}, 0, 2),
    ("lms", {}, 4, 4),
    ("pndm", {}, 0, 2),  # its weights are for even steps in time: second order, as its paper says
    ("unipc", {"order": 2}, 3, 2),
    ("unipc", {"order": 3}, 4, 3),
    ("unipc_bh1", {"order": 2, "solver_type": "bh1"}, 3, 2),
    ("sa_solver", {"eta": 0.0}, 0, 2),
]


def is_vp(name):
    return BUILTIN[name].levels is not on_sigmas


def smooth_program(name, steps, options):
    scheduler, levels = BUILTIN[name], smooth_levels(steps, is_vp(name))
    if name == "pndm":  # as by_plms: the first step once more
        starts, ends = levels.starts, levels.ends
        levels = replace(levels, starts=(starts[0], *starts), ends=(ends[0], *ends))
    if "lower_order_final" in keyword_defaults(scheduler.sampler):
        options = {**options, "lower_order_final": False}
    return trace(name, scheduler.sampler, levels, "sample", scheduler.keeps, **options), levels


@pytest.mark.parametrize(("name", "options", "injected", "order"), ORDERS)
def test_order_on_the_gaussian_flow(name, options, injected, order):
    errors = []
    for steps in (36, 72, 144):
        program, levels = smooth_program(name, steps, options)
        errors.append(flow_error(program, levels, BUILTIN[name].keeps, injected))
    # an order is a floor: a corrector (UniPC) or a lucky constant may do better
    assert slope([errors[0], errors[2]]) / 2 > order - 0.2, errors
    assert errors[-1] < 0.01


def test_first_order_is_no_more_than_that():
    """The measure can tell orders apart."""
    for name in ("ddim", "euler"):
        errors = [flow_error(*smooth_program(name, n, {}), "x0", 0) for n in (36, 72)]
        assert slope(errors) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("name", "options", "close"),
    [
        ("ddim", {"eta": 1.0}, 0.02),
        ("ddpm", {}, 0.02),
        ("euler_a", {}, 0.02),
        ("dpm2_a", {}, 0.006),
        ("dpmpp_2s_a", {}, 0.009),
        ("dpmpp_sde", {}, 0.008),
        ("dpmpp_2m_sde", {}, 0.01),
        ("dpmpp_2m_sde", {"eta": 0.5}, 0.01),
        ("dpmpp_2m_sde_heun", {}, 0.008),
        ("dpmpp_3m_sde", {}, 0.01),
        ("sa_solver", {}, 0.006),
        ("sa_solver", {"eta": 0.5}, 0.006),
    ],
)
def test_stochastic_samplers_keep_the_law(name, options, close):
    """Mean and spread of the end, exactly, on SD's own schedule: right, and nearer with more steps."""
    laws = [law(BUILTIN[name].program(SCHEDULE, n, **options), is_vp(name)) for n in (25, 50, 150)]
    end = BUILTIN[name].program(SCHEDULE, 25, **options)
    assert end.draws.sum() > 0
    for mean, _ in laws:
        assert mean == pytest.approx(MEAN, abs=5e-4)
    misses = [abs(spread - SPREAD) for _, spread in laws]
    assert misses[2] < close * 1.3 and misses[2] < misses[1] < misses[0], misses


def test_a_consistency_network_gives_lcm_the_exact_law():
    """LCM's network answers with the end of the flow, not a mean: then the law is exact at any step count."""

    def end_of_flow(x, alpha, sigma):
        found = x * SPREAD / spread_at(alpha, sigma)
        found[0] += MEAN - alpha * MEAN * SPREAD / spread_at(alpha, sigma)
        return found

    for steps in (1, 2, 8):
        mean, spread = law(BUILTIN["lcm"].program(SCHEDULE, steps), True, end_of_flow)
        # its boundary condition lets in c_skip = 1 / (20 t)^2 of x
        assert mean == pytest.approx(MEAN, abs=1e-5) and spread == pytest.approx(SPREAD, abs=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ancestral_split_adds_up(eta):
    down, up = ancestral_split(3.0, 1.2, eta)
    assert math.hypot(down, up) == pytest.approx(1.2)
    assert (up == 0) == (eta == 0)


# -- k-diffusion's signature


def k_euler_ancestral(denoise, x, sigmas, noise, *, eta=1.0):
    """As k-diffusion writes it."""
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        sigma_up = min(
            sigmas[i + 1],
            eta * (sigmas[i + 1] ** 2 * (sigmas[i] ** 2 - sigmas[i + 1] ** 2) / sigmas[i] ** 2) ** 0.5,
        )
        sigma_down = (sigmas[i + 1] ** 2 - sigma_up**2) ** 0.5
        d = (x - denoised) / sigmas[i]
        x = x + d * (sigma_down - sigmas[i])
        if sigmas[i + 1] > 0:
            x = x + noise(sigmas[i], sigmas[i + 1]) * sigma_up
    return x


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_a_sampler_in_k_diffusions_manner_runs_as_a_table(eta):
    mine = Scheduler("mine", from_k_diffusion(k_euler_ancestral))
    ours = by_table(mine, BASE, 12, 3, dtype=torch.float64, eta=eta)
    theirs = by_table(BUILTIN["euler_a"], BASE, 12, 3, dtype=torch.float64, eta=eta)
    assert relative(ours, theirs) < 1e-12


def test_a_refused_one_bears_its_own_name():
    def k_dpm_adaptive(denoise, x, sigmas, noise):
        return x if (x - denoise(x, sigmas[0])).norm() < 1 else denoise(x, sigmas[0])

    with pytest.raises(UsageError, match="k_dpm_adaptive uses 'norm' of a latent"):
        Scheduler("adaptive", from_k_diffusion(k_dpm_adaptive)).program(BASE, 5)
