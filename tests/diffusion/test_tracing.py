"""Tracing: a linear sampler becomes its table; what is not linear is refused by name, with the reason."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchsd.diffusion.builtin import BUILTIN
from batchsd.diffusion.program import HISTORY
from batchsd.diffusion.scheduler import Scheduler
from batchsd.types import UsageError

from .oracle import BASE, by_function, by_table, relative

number = st.floats(-1.5, 1.5)


@st.composite
def linear_samplers(draw):
    """A sampler with random coefficients over everything that a line can hold."""
    steps = draw(st.integers(1, 9))
    row = st.tuples(number, number, *[number] * HISTORY, number, number)
    table = draw(st.lists(row, min_size=steps, max_size=steps))

    def sampler(denoise, x, levels, noise):
        before, estimates = 0.0 * x, []
        for (here, _), (a, a_prev, *b, c0, c1) in zip(levels, table, strict=True):
            estimates.insert(0, denoise(x, here))
            first, second = noise(), noise()
            moved = a * x + a_prev * before + c0 * first + c1 * second
            moved = moved + sum(k * h for k, h in zip(b, estimates, strict=False))
            before, x = x, moved
        return x

    return Scheduler("random", sampler), steps


@settings(max_examples=40, deadline=None)
@given(linear_samplers())
def test_random_linear_samplers_equal_their_tables(made):
    scheduler, steps = made
    table = by_table(scheduler, BASE, steps, dtype=torch.float64)
    function = by_function(scheduler, BASE, steps)
    assert (table - function).abs().max() <= 1e-9 * (1 + function.abs().max())


def test_euler_reads_off_as_its_formula():
    program = BUILTIN["euler"].program(BASE, 8)
    ratio = np.append(program.call_sigma[1:], 0) / program.call_sigma
    np.testing.assert_allclose(program.a, ratio, rtol=1e-12)
    np.testing.assert_allclose(program.b[:, 0], 1 - ratio, rtol=1e-12)
    assert not program.b[:, 1:].any() and not program.a_prev.any() and not program.c.any()


def test_plms_reaches_back_over_five_calls_and_no_more_than_it_says():
    b = BUILTIN["pndm"].program(BASE, 12).b
    assert (b[4] != 0).tolist() == [True, True, True, False, True]
    assert (b[8] != 0).tolist() == [True, True, True, True, False]


def test_only_what_needs_the_point_before_uses_it():
    needs = {name for name, s in BUILTIN.items() if s.program(BASE, 12).a_prev.any()}
    assert needs == {"dpmpp_sde"}


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        ("ddim", [0] * 5),
        ("euler_a", [1] * 5),
        ("ddpm", [1] * 5),
        ("dpm2_a", [0, 1] * 4 + [0]),
        ("dpmpp_2s_a", [0, 1] * 4 + [0]),
        ("dpmpp_sde", [1, 1] * 4 + [0]),
        ("dpmpp_2m_sde", [1] * 5),
        ("sa_solver", [1] * 5),
        ("lcm", [1, 1, 1, 1, 0]),
    ],
)
def test_draws(name, draws):
    program = BUILTIN[name].program(BASE, 5)
    assert program.draws.tolist() == draws
    # the last is drawn, as diffusers does, and left unused
    if name == "euler_a":
        assert program.c[-1].tolist() == [0, 0] and program.c[-2, 0] > 0


# -- what is refused


def adaptive(denoise, x, levels, noise):
    for here, there in levels:
        x0 = denoise(x, here)
        x = x0 if abs(x - x0) < 1 else there.sigma * x
    return x


def thresholding(denoise, x, levels, noise):
    for here, _ in levels:
        x = denoise(x, here).clamp(-1, 1)
    return x


def torch_thresholding(denoise, x, levels, noise):
    for here, _ in levels:
        x = torch.clamp(denoise(x, here), -1, 1)
    return x


def product(denoise, x, levels, noise):
    return x * denoise(x, levels.starts[0])


def quotient(denoise, x, levels, noise):
    return x / denoise(x, levels.starts[0])


def inverse(denoise, x, levels, noise):
    return 1 / denoise(x, levels.starts[0])


def square(denoise, x, levels, noise):
    return denoise(x, levels.starts[0]) ** 2


def constant(denoise, x, levels, noise):
    return denoise(x, levels.starts[0]) + 1


def branching(denoise, x, levels, noise):
    return x if denoise(x, levels.starts[0]) > 0 else -x


def early_noise(denoise, x, levels, noise):
    return denoise(x + noise(), levels.starts[0])


def moved_start(denoise, x, levels, noise):
    return denoise(2 * x, levels.starts[0])


def three_draws(denoise, x, levels, noise):
    return denoise(x, levels.starts[0]) + noise() + noise() + noise()


def long_memory(denoise, x, levels, noise):
    estimates = []
    for here, _ in levels:
        estimates.insert(0, denoise(x, here))
        x = sum(h / (lag + 1) ** 2 for lag, h in enumerate(estimates))
    return x


def idle(denoise, x, levels, noise):
    return x


def empty(denoise, x, levels, noise):
    denoise(x, levels.starts[0])


def infinite(denoise, x, levels, noise):
    return math.inf * denoise(x, levels.starts[0])


@pytest.mark.parametrize(
    ("sampler", "reason"),
    [
        (adaptive, "compares latents"),
        (thresholding, "uses 'clamp' of a latent"),
        (torch_thresholding, "applies torch.clamp to a latent"),
        (product, "multiplies latents with each other"),
        (quotient, "divides by a latent"),
        (inverse, "divides by a latent"),
        (square, "raises a latent to a power"),
        (constant, "adds a constant to a latent"),
        (branching, "compares latents"),
        (early_noise, "draws noise before its first network call"),
        (moved_start, "moves x before its first network call"),
        (three_draws, "draws more than 2 noises"),
        (long_memory, "needs more at network call 8"),
        (idle, "returns no latent that it made from the network's outputs"),
        (empty, "returns no latent that it made from the network's outputs"),
        (infinite, "has an infinite coefficient at network call 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_linear_is_refused_by_name(sampler, reason):
    with pytest.raises(UsageError, match=f"'mine' cannot run as a table: {sampler.__name__} {reason}"):
        Scheduler("mine", sampler).program(BASE, 8)


def test_a_history_of_slopes_wants_keeps_eps():
    lms = BUILTIN["lms"]
    with pytest.raises(UsageError, match="register it with keeps='eps'"):
        Scheduler("mine", lms.sampler).program(BASE, 8)
    mine = Scheduler("mine", lms.sampler, keeps="eps")
    assert relative(by_table(mine, BASE, 8), by_table(lms, BASE, 8)) < 1e-6
