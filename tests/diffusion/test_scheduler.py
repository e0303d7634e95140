"""Where an option's value comes from, and what a plugin author is told."""

from __future__ import annotations

import pytest

from batchsd.diffusion.builtin import BUILTIN
from batchsd.diffusion.levels import by_stride
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.diffusion.scheduler import NOT_BUILT, Scheduler
from batchsd.types import UsageError

from .oracle import BASE

SCHEDULE = NoiseSchedule.from_config(BASE)


def scaled(denoise, x, levels, noise, *, strength=0.5, order=1):
    for here, _ in levels:
        x = strength * denoise(x, here)
    return x


def value(scheduler, config, name, **given):
    return scheduler.resolved(NoiseSchedule.from_config(config), given)[name]


def test_values_rise_from_function_to_class_to_checkpoint_to_name_to_job():
    plain = Scheduler("mine", scaled)
    asked = {**BASE, "solver_order": 3}
    assert value(plain, BASE, "order") == 1
    assert value(Scheduler("mine", scaled, defaults={"order": 2}), BASE, "order") == 2
    assert value(Scheduler("mine", scaled, defaults={"order": 2}), asked, "order") == 3
    assert value(Scheduler("mine", scaled, preset={"order": 4}), asked, "order") == 4
    assert value(Scheduler("mine", scaled, preset={"order": 4}), asked, "order", order=5) == 5


def test_null_in_a_config_means_absent():
    assert value(BUILTIN["euler"], {**BASE, "timestep_spacing": None}, "spacing") == "linspace"


def test_job_overrides_spacing_and_sigmas_of_the_checkpoint():
    config = {**BASE, "use_karras_sigmas": True}
    plain = BUILTIN["euler"].program(config, 10, sigmas="model", spacing="trailing")
    assert plain.timesteps.tolist() == [999 - 100 * i for i in range(10)]
    as_said = BUILTIN["euler"].program(config, 10, sigmas="", spacing=None)
    assert as_said.timesteps[0] == pytest.approx(901) and as_said.timesteps[1] != 801


def test_unknown_options_list_the_known():
    with pytest.raises(
        UsageError, match="sampler.sigmas: scheduler 'ddim' has no such option; have spacing,"
    ):
        BUILTIN["ddim"].program(SCHEDULE, 5, sigmas="karras")
    with pytest.raises(UsageError, match="scheduler 'mine': has no option 'etta'; have spacing,.* strength"):
        Scheduler("mine", scaled, defaults={"etta": 1}).program(SCHEDULE, 5)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("dpm_multistep", {"algorithm_type": "dpmsolver"}, "algorithm_type: 'dpmsolver' is not built"),
        ("dpm_singlestep", {"algorithm_type": "sde-dpmsolver++"}, "'sde-dpmsolver\\+\\+' is not built"),
        ("dpmpp_2m", {"solver_type": "rk4"}, "solver_type: 'rk4' is unknown; have midpoint, heun"),
        ("ddpm", {"variance_type": "learned"}, "variance_type: 'learned' is unknown"),
    ],
)
def test_values_that_a_sampler_does_not_know(name, options, says):
    with pytest.raises(UsageError, match=says):
        BUILTIN[name].program(SCHEDULE, 8, **options)


@pytest.mark.parametrize(("key", "value"), NOT_BUILT)
def test_settings_that_no_table_does_are_refused(key, value):
    with pytest.raises(
        UsageError, match=f"scheduler_config.json: {key}: {value!r}: .*; take this setting out"
    ):
        BUILTIN["dpm_multistep"].program({**BASE, key: value}, 8)


def test_programs_are_remembered():
    first = BUILTIN["ddim"].program(SCHEDULE, 7, 2, eta=0.5)
    assert BUILTIN["ddim"].program(SCHEDULE, 7, 2, eta=0.5) is first
    assert BUILTIN["ddim"].program(SCHEDULE, 7, 3, eta=0.5) is not first
    assert BUILTIN["ddim"].program(SCHEDULE, 7, 2) is not first


def test_a_plugin_is_one_function():
    program = Scheduler("mine", scaled).program(SCHEDULE, 3, strength=0.25)
    assert program.b[:, 0].tolist() == [0.25] * 3 and not program.a.any()
    assert Scheduler("mine", scaled, by_stride).program(SCHEDULE, 3).init_noise == 1
