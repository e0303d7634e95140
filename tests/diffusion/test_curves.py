"""Sigma schedules against scipy, diffusers' published table and their definitions."""

from __future__ import annotations

import diffusers.schedulers
import numpy as np
import pytest
import scipy.stats

from batchsd.diffusion.curves import CURVES, beta_quantiles, curve_named
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.types import UsageError

from .oracle import BASE

SCHEDULE = NoiseSchedule.from_config(BASE)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_every_curve_falls_and_starts_at_the_top(name, count):
    top, bottom = float(SCHEDULE.sigmas[-1]), float(SCHEDULE.sigmas[0])
    sigmas = CURVES[name](SCHEDULE, top, bottom, count)
    assert sigmas.shape == (count,)
    assert np.all(np.diff(sigmas) < 0) and sigmas[-1] > 0
    assert sigmas[0] == pytest.approx(top, rel=1e-4)
    if name in ("karras", "exponential", "beta") and count > 1:
        assert sigmas[-1] == pytest.approx(bottom, rel=1e-9)


@pytest.mark.parametrize("a", [0.6, 0.9, 2.5])
def test_beta_quantiles_equal_scipy(a):
    p = np.concatenate([np.linspace(0, 1, 101), [1e-6, 1 - 1e-6]])
    np.testing.assert_allclose(beta_quantiles(p, a), scipy.stats.beta.ppf(p, a, a), rtol=1e-6, atol=1e-9)


def test_align_your_steps_is_the_published_table_at_ten_steps():
    for ours, theirs in (("", "StableDiffusionSigmas"), ("_sdxl", "StableDiffusionXLSigmas")):
        table = diffusers.schedulers.AysSchedules[theirs]
        sigmas = CURVES[f"align_your_steps{ours}"](SCHEDULE, 14.6, 0.03, 10)
        np.testing.assert_allclose(sigmas, table[:10], rtol=1e-9)


def test_sgm_uniform_takes_even_timesteps():
    sigmas = CURVES["sgm_uniform"](SCHEDULE, float(SCHEDULE.sigmas[-1]), float(SCHEDULE.sigmas[0]), 9)
    np.testing.assert_allclose(sigmas, SCHEDULE.sigmas[[999 - 111 * i for i in range(9)]], rtol=1e-9)


def test_unknown_curve_lists_the_known():
    assert curve_named("model") is None
    with pytest.raises(UsageError, match="sampler.sigmas: 'turbo' is unknown; have model, karras"):
        curve_named("turbo")
