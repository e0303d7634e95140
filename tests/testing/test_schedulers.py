"""The scheduler's contract: all of ours keep it, and each broken promise is found."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import batchsd.testing.schedulers as contract
from batchsd.diffusion.builtin import BUILTIN
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.diffusion.scheduler import Scheduler
from batchsd.diffusion.walk import run_program
from batchsd.testing import check_scheduler, consistency, posterior_mean

# Samplers of distilled models have a grid of 50 steps. LCM's network jumps to the path's end; TCD jumps part
# of the way and adds noise again, which in 50 steps costs it a tenth of the deviation.
DISTILLED = {"lcm": {"clean": consistency, "steps": 50}, "tcd": {"steps": 50, "tolerance": 0.15}}


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_keeps_the_contract(name):
    check_scheduler(BUILTIN[name], **DISTILLED.get(name, {}))


def test_the_gaussian_end_is_what_many_walks_show():
    """The exact reading of mean and deviation against 20,000 random walks of Euler a."""
    schedule = NoiseSchedule.from_config(contract.SD_CONFIG)
    program = BUILTIN["euler_a"].program(schedule, 100)
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20_000, generator=generator, dtype=torch.float64)  # noqa: E731
    end = run_program(
        program, contract.gaussian_network(schedule, posterior_mean), program.init_noise * draw(), draw
    )
    with pytest.raises(AssertionError) as error:
        check_scheduler(BUILTIN["euler_a"], tolerance=0.05)
    exact = float(str(error.value).split("standard deviation ")[1].split(",")[0])
    assert float(end.std()) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_perfect_network_is_the_posterior_mean(prediction_type):
    """E[x0 | x] by summing over a fine grid of x0."""
    schedule = NoiseSchedule.from_config({**contract.SD_CONFIG, "prediction_type": prediction_type})
    t, x = 400, 0.9
    alpha, sigma = schedule.alphas_cumprod[t] ** 0.5, (1 - schedule.alphas_cumprod[t]) ** 0.5
    grid = np.linspace(-6, 6, 20_001)
    weight = np.exp(
        -((grid - contract.MEAN) ** 2) / (2 * contract.STD**2) - (x - alpha * grid) ** 2 / (2 * sigma**2)
    )
    x0 = (grid * weight).sum() / weight.sum()
    eps = (x - alpha * x0) / sigma
    wanted = {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0}[prediction_type]
    found = contract.gaussian_network(schedule, posterior_mean)(torch.tensor([x], dtype=torch.float64), t)
    assert float(found) == pytest.approx(wanted, abs=1e-9)


def test_consistency_is_the_end_of_the_noise_free_path():
    """Karras et al., 2022, eq. 1: dx/dsigma = (x - E[x_0 | x]) / sigma, followed in 20,000 Euler steps."""
    alpha, sigma = 0.6, 0.8
    x, ratios = 0.9 / alpha, np.linspace(sigma / alpha, 1e-4, 20_001)
    for here, there in zip(ratios, ratios[1:], strict=False):
        x += (there - here) * (x - posterior_mean(x, 1.0, here)) / here
    assert consistency(0.9, alpha, sigma) == pytest.approx(x, abs=2e-4)


def euler(denoise, x, levels, noise):
    for here, there in levels:
        x = x + (there.sigma - here.sigma) * denoise.eps(x, here)
    return x


def no_way_down(denoise, x, levels, noise):
    for here, there in levels:
        x = x + 0.5 * (there.sigma - here.sigma) * denoise.eps(x, here)
    return x


def clamps(denoise, x, levels, noise):
    return euler(denoise, x, levels, noise).clamp(-1, 1)


def needs_three_steps(denoise, x, levels, noise):
    assert len(levels) > 2
    return euler(denoise, x, levels, noise)


def other_on_symbols(denoise, x, levels, noise):
    """Does something else when it is traced than when it runs."""
    factor = 1.0 if isinstance(x, torch.Tensor) else 1.01
    return factor * euler(denoise, x, levels, noise)


def too_little_noise(denoise, x, levels, noise):
    for here, there in levels:
        x = denoise(x, here) + 0.5 * there.sigma * noise()
    return x


class Whims:
    """Another table at every call."""

    calls = 0

    def __call__(self, denoise, x, levels, noise):
        self.calls += 1
        return (1 + self.calls / 1000) * euler(denoise, x, levels, noise)


@pytest.mark.parametrize(
    "sampler, words",
    [
        (no_way_down, "100 steps on data"),
        (too_little_noise, "end with standard deviation"),
        (
            clamps,
            "1 steps, 0 skipped, epsilon: scheduler 'broken' cannot run as a table: clamps uses 'clamp'",
        ),
        (needs_three_steps, ""),
        (other_on_symbols, "away from the function"),
        (Whims(), "differs when made again"),
    ],
)
def test_broken_sampler_is_found(sampler, words):
    with pytest.raises(AssertionError) as error:
        check_scheduler(Scheduler("broken", sampler))
    assert words in str(error.value)


def test_a_good_plugin_sampler_passes():
    check_scheduler(Scheduler("mine", euler))


def test_what_is_no_scheduler():
    with pytest.raises(AssertionError, match="is not a batchsd.Scheduler"):
        check_scheduler(euler)
    with pytest.raises(AssertionError, match="name is ''"):
        check_scheduler(replace(BUILTIN["euler"], name=""))
