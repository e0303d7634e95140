"""Two-stage samplers that diffusers lacks or gives no generator: k-diffusion's text, and diffusers' step."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from batchsd.diffusion.builtin import BUILTIN
from batchsd.diffusion.levels import Level, Levels
from batchsd.diffusion.samplers import from_k_diffusion
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.diffusion.scheduler import Scheduler
from batchsd.diffusion.stages import group_orders

from .oracle import BASE, SHAPE, by_table, draws, relative, toy_network


def k_ancestral_step(sigma_from, sigma_to, eta):
    sigma_up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


def k_dpmpp_2s_ancestral(denoise, x, sigmas, noise, *, eta=1.0):
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        sigma_down, sigma_up = k_ancestral_step(sigmas[i], sigmas[i + 1], eta)
        if sigma_down == 0:
            x = x + (x - denoised) / sigmas[i] * (sigma_down - sigmas[i])
        else:
            t, t_next = -math.log(sigmas[i]), -math.log(sigma_down)
            h = t_next - t
            s = t + h / 2
            x_2 = math.exp(-s) / math.exp(-t) * x - math.expm1(-h / 2) * denoised
            denoised_2 = denoise(x_2, math.exp(-s))
            x = math.exp(-t_next) / math.exp(-t) * x - math.expm1(-h) * denoised_2
        if sigmas[i + 1] > 0:
            x = x + noise(sigmas[i], sigmas[i + 1]) * sigma_up
    return x


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_2s_ancestral_equals_k_diffusions_text(eta):
    mine = Scheduler("k", from_k_diffusion(k_dpmpp_2s_ancestral))
    for config in (BASE, {**BASE, "use_karras_sigmas": True}):
        theirs = by_table(mine, config, 11, 2, dtype=torch.float64, eta=eta)
        ours = by_table(BUILTIN["dpmpp_2s_a"], config, 11, 2, dtype=torch.float64, eta=eta)
        assert relative(ours, theirs) < 1e-10


class Path:
    """diffusers' Brownian noise sampler, over a path whose increments are our draws.

    It is asked for the noise from a step's start to its middle, then from the start to its end.
    """

    def __init__(self, draw):
        self.draw, self.early, self.middle = draw, None, 0.0

    def __call__(self, start, end):
        if self.early is None:
            self.early, self.middle = self.draw(), end
            return self.early
        whole = (start - self.middle).sqrt() * self.early + (self.middle - end).sqrt() * self.draw()
        self.early = None
        return whole / (start - end).sqrt()


@pytest.mark.parametrize("change", [{}, {"use_karras_sigmas": True}, {"prediction_type": "v_prediction"}])
def test_dpmpp_sde_equals_diffusers_along_the_same_path(change, monkeypatch):
    """DPMSolverSDEScheduler takes no generator (its path comes from torchsde), so it is handed our draws."""
    monkeypatch.setitem(sys.modules, "torchsde", SimpleNamespace())
    from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    config = {**BASE, "timestep_spacing": "linspace", **change}
    scheduler = DPMSolverSDEScheduler.from_config(config)
    scheduler.set_timesteps(14)
    _, draw = draws()
    x = draw() * scheduler.init_noise_sigma
    scheduler.noise_sampler = Path(draw)
    for t in scheduler.timesteps:
        x = scheduler.step(toy_network(scheduler.scale_model_input(x, t), float(t)), t, x)[0]
    assert x.shape == SHAPE
    assert relative(by_table(BUILTIN["dpmpp_sde"], config, 14), x.float()) < 1e-4


@pytest.mark.parametrize(
    ("steps", "order", "lower", "clean", "orders"),
    [
        (6, 2, True, True, [1, 2, 1, 2, 1, 1]),
        (7, 2, False, True, [1, 2, 1, 2, 1, 2, 1]),
        (6, 2, False, False, [1, 2, 1, 2, 1, 2]),
        (6, 3, True, True, [1, 2, 3, 1, 2, 1]),
        (7, 3, True, False, [1, 2, 3, 1, 2, 3, 1]),
        (8, 3, False, False, [1, 2, 3, 1, 2, 3, 1, 2]),
        (6, 3, False, False, [1, 2, 3, 1, 2, 3]),
        (3, 1, False, True, [1, 1, 1]),
    ],
)
def test_orders_of_singlestep_groups(steps, order, lower, clean, orders):
    end = Level(0, 1, 0) if clean else Level(0, 1, 0.1)
    stops = [Level(1, 1, float(s)) for s in range(steps, 0, -1)]
    levels = Levels(tuple(stops), (*stops[1:], end), NoiseSchedule.from_config(BASE), vp=False)
    assert group_orders(levels, order, lower) == orders
