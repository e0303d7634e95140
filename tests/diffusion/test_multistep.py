"""Multistep samplers against scipy's quadrature and k-diffusion's own text of 2M, 2M SDE and 3M SDE."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.integrate
import torch

from batchsd.diffusion.builtin import BUILTIN
from batchsd.diffusion.multistep import lagrange_integrals
from batchsd.diffusion.samplers import from_k_diffusion
from batchsd.diffusion.scheduler import Scheduler

from .oracle import BASE, by_table, relative


@pytest.mark.parametrize("rate", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("times", [(2.0,), (2.0, 3.1), (2.0, 3.1, 5.0), (2.0, 3.1, 5.0, 8.0)])
def test_lagrange_integrals_equal_scipys_quadrature(times, rate):
    ours = lagrange_integrals(times, 2.0, 0.5, rate)
    for j, tj in enumerate(times):

        def integrand(u, j=j, tj=tj):
            basis = math.prod((u - tk) / (tj - tk) for k, tk in enumerate(times) if k != j)
            return basis * math.exp(rate * (u - 0.5))

        assert ours[j] == pytest.approx(scipy.integrate.quad(integrand, 2.0, 0.5)[0], rel=1e-10)


def test_weights_of_a_constant_sum_to_the_integral():
    weights = lagrange_integrals((1.0, 0.0, -2.0), 1.0, 4.0, 1.5)
    assert sum(weights) == pytest.approx((1 - math.exp(-1.5 * 3)) / 1.5)


def k_dpmpp_2m(denoise, x, sigmas, noise):
    t_fn = [-math.log(s) if s else math.inf for s in sigmas]
    old_denoised = None
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        h = t_fn[i + 1] - t_fn[i]
        if old_denoised is None or sigmas[i + 1] == 0:
            x = (sigmas[i + 1] / sigmas[i]) * x - math.expm1(-h) * denoised
        else:
            r = (t_fn[i] - t_fn[i - 1]) / h
            denoised_d = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old_denoised
            x = (sigmas[i + 1] / sigmas[i]) * x - math.expm1(-h) * denoised_d
        old_denoised = denoised
    return x


def k_dpmpp_2m_sde(denoise, x, sigmas, noise, *, eta=1.0, solver="midpoint"):
    old_denoised, h_last = None, None
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        drawn = noise(sigmas[i], sigmas[i + 1])
        if sigmas[i + 1] == 0:
            return denoised
        h = math.log(sigmas[i] / sigmas[i + 1])
        eta_h = eta * h
        x = sigmas[i + 1] / sigmas[i] * math.exp(-eta_h) * x - math.expm1(-h - eta_h) * denoised
        if old_denoised is not None:
            r = h_last / h
            if solver == "heun":
                phi = math.expm1(-h - eta_h) / (h + eta_h) + 1
                x = x + phi * (1 / r) * (denoised - old_denoised)
            else:
                x = x - 0.5 * math.expm1(-h - eta_h) * (1 / r) * (denoised - old_denoised)
        x = x + drawn * sigmas[i + 1] * math.sqrt(-math.expm1(-2 * eta_h))
        old_denoised, h_last = denoised, h
    return x


def k_dpmpp_3m_sde(denoise, x, sigmas, noise, *, eta=1.0):
    denoised_1, denoised_2, h_1, h_2 = None, None, None, None
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        drawn = noise(sigmas[i], sigmas[i + 1])
        if sigmas[i + 1] == 0:
            return denoised
        h = math.log(sigmas[i] / sigmas[i + 1])
        h_eta = h * (eta + 1)
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        if h_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            phi_2 = math.expm1(-h_eta) / h_eta + 1
            phi_3 = phi_2 / h_eta - 0.5
            x = x + phi_2 * d1 - phi_3 * d2
        elif h_1 is not None:
            phi_2 = math.expm1(-h_eta) / h_eta + 1
            x = x + phi_2 * (denoised - denoised_1) / (h_1 / h)
        x = x + drawn * sigmas[i + 1] * math.sqrt(-math.expm1(-2 * h * eta))
        denoised_1, denoised_2, h_1, h_2 = denoised, denoised_1, h, h_1
    return x


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize(
    ("name", "theirs", "ours_only", "theirs_only"),
    [
        ("dpmpp_2m", k_dpmpp_2m, {}, {}),
        ("dpmpp_2m_sde", k_dpmpp_2m_sde, {}, {}),
        ("dpmpp_2m_sde", k_dpmpp_2m_sde, {"eta": 0.4}, {"eta": 0.4}),
        ("dpmpp_2m_sde_heun", k_dpmpp_2m_sde, {}, {"solver": "heun"}),
        # diffusers' third-order SDE adds a half of the second difference where k-diffusion's and the formula
        # of the deterministic one take it away, so that its error does not vanish with the step
        ("dpmpp_3m_sde", k_dpmpp_3m_sde, {}, {}),
        ("dpmpp_3m_sde", k_dpmpp_3m_sde, {"eta": 0.4}, {"eta": 0.4}),
    ],
)
def test_k_diffusions_text_gives_the_same_picture(name, theirs, ours_only, theirs_only, steps):
    """On the same levels: ours walk VP, k-diffusion's the same x times sqrt(sigma^2 + 1)."""
    on_ours = Scheduler("k", from_k_diffusion(theirs), ve_levels_of(BUILTIN[name]))
    k = by_table(on_ours, BASE, steps, dtype=torch.float64, **theirs_only)
    assert relative(by_table(BUILTIN[name], BASE, steps, dtype=torch.float64, **ours_only), k) < 1e-9


def ve_levels_of(scheduler):
    def levels(schedule, steps, begin, *, spacing="leading", steps_offset=0):
        made = scheduler.levels(schedule, steps, begin, spacing=spacing, steps_offset=steps_offset)

        def ve(level):
            return replace(level, alpha=1.0, sigma=level.ratio)

        start = float(np.hypot(1, made.starts[0].ratio))
        return replace(
            made,
            starts=tuple(map(ve, made.starts)),
            ends=tuple(map(ve, made.ends)),
            vp=False,
            init_noise=start,
        )

    return levels
