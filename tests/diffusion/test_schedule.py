"""The forward process against diffusers' DDPM class, published numbers and its own algebra."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchsd.diffusion.schedule import (
    BETAS,
    PREDICTION_TYPES,
    NoiseSchedule,
    clean_coefficients,
    noise_coefficients,
)
from batchsd.types import UsageError

from .oracle import BASE


def test_golden_numbers_of_stable_diffusion():
    schedule = NoiseSchedule.from_config(BASE)
    np.testing.assert_allclose(schedule.alphas_cumprod[[0, 999]], [0.99914998, 0.00466010], rtol=0, atol=6e-9)
    np.testing.assert_allclose(schedule.sigmas[[0, 999]], [0.029168, 14.614647], rtol=2e-5)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", [*BETAS, "trained"])
def test_alphas_equal_diffusers(betas, zero_snr):
    config = {**BASE, "beta_schedule": betas, "rescale_betas_zero_snr": zero_snr}
    if betas == "trained":
        config |= {"beta_schedule": "linear", "trained_betas": np.linspace(1e-4, 0.03, 50).tolist()}
    theirs = diffusers.DDPMScheduler.from_config(config).alphas_cumprod.double().numpy()
    ours = NoiseSchedule.from_config(config)
    np.testing.assert_array_equal(ours.alphas_cumprod, theirs)
    assert ours.zero_snr == zero_snr
    assert np.isfinite(ours.sigmas).all()


def test_zero_snr_sigmas_are_clamped_as_in_diffusers():
    config = {**BASE, "rescale_betas_zero_snr": True}
    theirs = diffusers.EulerDiscreteScheduler.from_config(config).sigmas[0]
    assert NoiseSchedule.from_config(config).sigmas[-1] == pytest.approx(float(theirs), rel=1e-6)


def test_noising_and_velocity_equal_diffusers():
    theirs = diffusers.DDPMScheduler.from_config(BASE)
    ours = NoiseSchedule.from_config(BASE)
    x0, noise = torch.randn(2, 5, 4, 3, 3)
    t = torch.tensor([0, 7, 500, 998, 999])
    torch.testing.assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
    torch.testing.assert_close(ours.velocity(x0, noise, t), theirs.get_velocity(x0, noise, t))


@given(
    prediction=st.sampled_from(PREDICTION_TYPES),
    alpha=st.floats(0.01, 1),
    sigma=st.floats(0.01, 200),
    x0=st.floats(-3, 3),
    eps=st.floats(-3, 3),
)
def test_every_prediction_leads_back_to_x0_and_eps(prediction, alpha, sigma, x0, eps):
    r = np.hypot(alpha, sigma)
    x = alpha * x0 + sigma * eps
    told = {"epsilon": eps, "v_prediction": (alpha * eps - sigma * x0) / r, "sample": x0}[prediction]
    skip, out = clean_coefficients(prediction, alpha, sigma)
    assert skip * x + out * told == pytest.approx(x0, abs=1e-8 * (1 + sigma / alpha))
    skip, out = noise_coefficients(prediction, alpha, sigma)
    assert skip * x + out * told == pytest.approx(eps, abs=1e-8 * (1 + alpha / sigma))


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_targets_are_what_the_conversions_undo(prediction):
    schedule = NoiseSchedule.from_config({**BASE, "prediction_type": prediction})
    x0, noise = torch.randn(2, 6, 4, dtype=torch.float64)
    t = torch.arange(0, 1000, 170)
    x, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    for i, step in enumerate(t.tolist()):
        ac = schedule.alphas_cumprod[step]
        skip, out = clean_coefficients(prediction, ac**0.5, (1 - ac) ** 0.5)
        torch.testing.assert_close(skip * x[i] + out * target[i], x0[i])


@given(st.floats(0, 999))
def test_timestep_of_undoes_log_interpolated_sigmas(t):
    schedule = NoiseSchedule.from_config(BASE)
    sigma = np.exp(np.interp(t, np.arange(1000), np.log(schedule.sigmas)))
    assert schedule.timestep_of(sigma) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"prediction_type": "flow_prediction"},
            "prediction_type: 'flow_prediction' is unknown; have epsilon",
        ),
        ({"beta_schedule": "exp"}, "beta_schedule: 'exp' is unknown; have scaled_linear"),
    ],
)
def test_unknown_processes_are_refused(change, says):
    with pytest.raises(UsageError, match=says):
        NoiseSchedule.from_config({**BASE, **change})


def test_eps_at_zero_snr_is_refused():
    with pytest.raises(UsageError, match="zero terminal SNR"):
        clean_coefficients("epsilon", 0.0, 1.0)
