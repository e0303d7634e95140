"""Levels: golden timesteps, ends, image to image, and what is refused."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsd.diffusion.levels import (
    CLEAN,
    SPACINGS,
    by_distillation,
    by_neighbour,
    by_plms,
    by_stride,
    on_log_snr,
    on_sigmas,
)
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.types import UsageError

from .oracle import BASE

SCHEDULE = NoiseSchedule.from_config(BASE)
MAKERS = [by_stride, by_plms, by_neighbour, by_distillation, on_sigmas, on_log_snr]


def timesteps(levels):
    return [level.timestep for level in levels.starts]


def test_golden_timesteps_of_ten_steps():
    leading = [901 - 100 * i for i in range(10)]
    assert timesteps(by_stride(SCHEDULE, 10, 0, steps_offset=1)) == leading
    assert timesteps(on_sigmas(SCHEDULE, 10, 0, spacing="linspace")) == [999 - 111 * i for i in range(10)]
    assert timesteps(on_sigmas(SCHEDULE, 10, 0, spacing="trailing")) == [999 - 100 * i for i in range(10)]
    plms = by_plms(SCHEDULE, 10, 0, steps_offset=1)
    assert timesteps(plms) == [901, 901, 801, *leading[2:]] and len(plms) == 11


def test_golden_sigmas_of_sdxl():
    """SDXL's leading walk starts at sigma 8.39, init_noise_sigma 8.45; Karras goes from there to 0.041."""
    levels = on_sigmas(SCHEDULE, 10, 0, spacing="leading", steps_offset=1, sigmas="karras")
    assert levels.starts[0].sigma == pytest.approx(8.39, abs=0.005)
    assert levels.init_noise == pytest.approx(8.45, abs=0.005)
    assert levels.starts[-1].sigma == pytest.approx(0.0413, abs=0.0005)
    for spacing in ("linspace", "trailing"):
        assert on_sigmas(SCHEDULE, 10, 0, spacing=spacing).init_noise == pytest.approx(14.614647, rel=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 61, 333])
@pytest.mark.parametrize(
    ("maker", "class_name"), [(by_stride, "DDIMScheduler"), (on_log_snr, "DPMSolverMultistepScheduler")]
)
def test_timesteps_equal_diffusers(maker, class_name, steps, spacing):
    theirs = getattr(diffusers, class_name).from_config({**BASE, "timestep_spacing": spacing})
    theirs.set_timesteps(steps)
    ours = timesteps(maker(SCHEDULE, steps, 0, spacing=spacing, steps_offset=1))
    # for 61 steps and some more, diffusers' trailing list has one too many, at -1
    assert ours == [t for t in theirs.timesteps.tolist() if t >= 0]


@given(st.sampled_from(MAKERS), st.integers(1, 50), st.data())
def test_levels_fall_and_begin_cuts_the_front(maker, steps, data):
    begin = data.draw(st.integers(0, steps - 1))
    # without the offset PNDM's last step goes from timestep 0 to timestep 0
    offset = {} if maker is by_distillation else {"steps_offset": 1}
    whole, rest = maker(SCHEDULE, steps, 0, **offset), maker(SCHEDULE, steps, begin, **offset)
    for here, there in rest:
        assert there.ratio < here.ratio
        for level in (here, there):
            assert (math.hypot(level.alpha, level.sigma) if rest.vp else level.alpha) == pytest.approx(1)
    assert rest.init_noise == whole.init_noise and rest.skipped == begin
    if maker is not by_plms:
        assert rest.starts == whole.starts[begin:] and rest.ends == whole.ends[begin:]
        assert rest.total == whole.total == steps


def test_ddim_goes_a_stride_down_wherever_the_next_step_starts():
    levels = by_stride(SCHEDULE, 10, 0, spacing="linspace")
    assert [end.timestep for end in levels.ends[:2]] == [899, 788]
    assert levels.starts[1].timestep == 888


@pytest.mark.parametrize(
    ("options", "sigma"),
    [
        ({"set_alpha_to_one": True}, 0.0),
        ({"set_alpha_to_one": False}, 0.029155),
        ({"set_alpha_to_one": False, "final_sigma": "zero"}, 0.0),
        ({"set_alpha_to_one": True, "final_sigma": "sigma_min"}, 0.029155),
    ],
)
def test_ddim_ends_as_asked(options, sigma):
    assert by_stride(SCHEDULE, 10, 0, **options).ends[-1].sigma == pytest.approx(sigma, abs=1e-6)


@pytest.mark.parametrize("maker", [on_sigmas, on_log_snr])
def test_final_sigma(maker):
    assert maker(SCHEDULE, 5, 0).ends[-1] == CLEAN
    assert maker(SCHEDULE, 5, 0, final_sigma="sigma_min").ends[-1].ratio == pytest.approx(0.0291675, rel=1e-5)


def test_cosine_schedule_is_clipped_as_in_diffusers():
    config = {**BASE, "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(config)
    theirs.set_timesteps(12)
    ours = on_log_snr(
        NoiseSchedule.from_config(config), 12, 0, spacing="leading", steps_offset=1, lambda_min_clipped=-5.1
    )
    assert timesteps(ours) == theirs.timesteps.tolist()
    np.testing.assert_allclose([s.ratio for s in ours.starts], theirs.sigmas[:-1].numpy(), rtol=1e-5)


def test_mid_stage_levels_lie_on_the_schedule():
    for maker in (on_sigmas, on_log_snr):
        level = maker(SCHEDULE, 5, 0).at(float(SCHEDULE.sigmas[400]))
        assert level.timestep == pytest.approx(400) and level.ratio == pytest.approx(SCHEDULE.sigmas[400])


def test_ends_of_the_scale():
    zero = NoiseSchedule.from_config({**BASE, "rescale_betas_zero_snr": True})
    first = by_stride(zero, 5, 0, spacing="trailing").starts[0]
    assert (first.alpha, first.sigma, first.ratio) == (0, 1, math.inf)
    assert (CLEAN.ratio, CLEAN.log_snr) == (0, math.inf)


@pytest.mark.parametrize(
    ("maker", "steps", "begin", "options", "says"),
    [
        (by_stride, 0, 0, {}, "sampler.steps: 0, of which 0 skipped"),
        (by_stride, 5, 5, {}, "5, of which 5 skipped"),
        (on_sigmas, 1001, 0, {}, "must be 1 to 1000"),
        (
            by_stride,
            1000,
            0,
            {"steps_offset": 1},
            "1000 are too many for 1000 timesteps with spacing 'leading'",
        ),
        (on_log_snr, 1000, 0, {}, "1000 are too many"),
        (by_distillation, 51, 0, {}, "51 are more than the 50 of distillation"),
        (by_stride, 5, 0, {"spacing": "even"}, "'even' is unknown; have leading, linspace, trailing"),
        (on_sigmas, 5, 0, {"final_sigma": "1"}, "final_sigma: '1' is unknown; have zero, sigma_min"),
        (on_sigmas, 5, 0, {"sigmas": "x"}, "sampler.sigmas: 'x' is unknown"),
    ],
)
def test_refusals(maker, steps, begin, options, says):
    with pytest.raises(UsageError, match=says):
        maker(SCHEDULE, steps, begin, **options)
