"""Every built-in scheduler: its table equals its function, and diffusers' class of that name; the names."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

from batchsd import plugins
from batchsd.diffusion.builtin import BUILTIN, TABLE, names, resolve
from batchsd.diffusion.curves import CURVES
from batchsd.diffusion.schedule import NoiseSchedule
from batchsd.diffusion.scheduler import Scheduler
from batchsd.recipe import names_of
from batchsd.types import UsageError

from .oracle import BASE, by_diffusers, by_function, by_table, relative

VARIANTS = {
    "leading": ({}, 20, 0),
    "offset 0, v": ({"steps_offset": 0, "prediction_type": "v_prediction"}, 20, 0),
    "linspace, v": ({"timestep_spacing": "linspace", "prediction_type": "v_prediction"}, 20, 0),
    "linspace, sample": ({"timestep_spacing": "linspace", "prediction_type": "sample"}, 20, 0),
    "trailing, few": ({"timestep_spacing": "trailing"}, 9, 0),
    "alpha to one": ({"set_alpha_to_one": True, "beta_schedule": "linear"}, 12, 0),
    "karras": ({"use_karras_sigmas": True}, 20, 0),
    "exponential, v": ({"use_exponential_sigmas": True, "prediction_type": "v_prediction"}, 13, 0),
    "beta": ({"use_beta_sigmas": True, "timestep_spacing": "trailing"}, 16, 0),
    "begin": ({}, 20, 6),
    "begin, few": ({"timestep_spacing": "linspace"}, 10, 7),
    "begin, karras": ({"use_karras_sigmas": True}, 20, 5),
    "one step": ({"timestep_spacing": "trailing"}, 1, 0),
}
"""(what is changed in the checkpoint's config, steps, begin)"""

NO_SAMPLE = ("euler_a", "dpm2", "dpm2_a", "pndm")  # diffusers: "not implemented yet"

PARITY = [
    # (scheduler, diffusers' class, what is changed in the config, eta)
    ("ddim", "DDIMScheduler", {}, None),
    ("ddim", "DDIMScheduler", {}, 0.7),
    ("ddpm", "DDPMScheduler", {}, None),
    ("ddpm", "DDPMScheduler", {"variance_type": "fixed_large"}, None),
    ("pndm", "PNDMScheduler", {}, None),
    ("lms", "LMSDiscreteScheduler", {}, None),
    ("euler", "EulerDiscreteScheduler", {}, None),
    ("euler", "EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min", "sigma_max": 9.0}, None),
    ("euler_a", "EulerAncestralDiscreteScheduler", {}, None),
    ("heun", "HeunDiscreteScheduler", {}, None),
    ("dpm2", "KDPM2DiscreteScheduler", {}, None),
    ("dpm2_a", "KDPM2AncestralDiscreteScheduler", {}, None),
    ("dpm_singlestep", "DPMSolverSinglestepScheduler", {}, None),
    ("dpm_singlestep", "DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}, None),
    (
        "dpm_singlestep",
        "DPMSolverSinglestepScheduler",
        {"solver_order": 3, "solver_type": "heun", "final_sigmas_type": "sigma_min"},
        None,
    ),
    ("dpm_multistep", "DPMSolverMultistepScheduler", {}, None),
    ("dpm_multistep", "DPMSolverMultistepScheduler", {"solver_type": "heun", "euler_at_final": True}, None),
    ("dpm_multistep", "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, None),
    ("dpm_multistep", "DPMSolverMultistepScheduler", {"lower_order_final": False, "solver_order": 3}, None),
    ("dpm_multistep", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, None),
    (
        "dpm_multistep",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        None,
    ),
    ("dpm_multistep", "DPMSolverMultistepScheduler", {"solver_order": 1}, None),
    ("deis", "DEISMultistepScheduler", {}, None),
    ("deis", "DEISMultistepScheduler", {"solver_order": 3}, None),
    ("unipc", "UniPCMultistepScheduler", {}, None),
    ("unipc", "UniPCMultistepScheduler", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, None),
    ("unipc", "UniPCMultistepScheduler", {"solver_order": 3}, None),
    ("sa_solver", "SASolverScheduler", {}, None),
    ("sa_solver", "SASolverScheduler", {"predictor_order": 3, "corrector_order": 4}, None),
    ("lcm", "LCMScheduler", {}, None),
    ("tcd", "TCDScheduler", {}, 0.3),
    ("tcd", "TCDScheduler", {}, 0.0),
]

DEVIATES = {
    ("pndm", "begin"): "the cut list has lost the doubled first step, and ends visibly noisy",
    ("pndm", " v"): "it combines v of several levels before it turns them into eps",
    ("lms", "begin"): "it takes fourth-order weights from the first call, for a history of one",
    ("sa_solver", "begin, karras"): "it noises at the rounded timestep's level, not at the walk's",
    ("sa_solver", "beta"): "its float32 weights cancel over tiny steps (run in float64 it agrees to 4e-6)",
}
"""(scheduler, part of a variant's name): why diffusers is wrong there, so that the function is the oracle."""

COSTLY = ("dpm2", "dpm2_a")  # diffusers takes half a second to build these classes


@pytest.fixture(scope="module")
def worst():
    """The largest errors of each scheduler, against diffusers and function against table: printed at the end."""
    found = {"diffusers": {}, "function": {}}
    yield found
    print(f"\n{'sampler':20} {'against diffusers':>18} {'function to table':>18}")
    for name in sorted({*found["diffusers"], *found["function"]}):
        errors = [found[kind].get(name) for kind in found]
        print(f"{name:20} " + " ".join(f"{'-' if error is None else f'{error:.1e}':>18}" for error in errors))


def note(errors, name, error):
    errors[name] = max(error, errors.get(name, 0.0))
    return error


def wrong_in_diffusers(name: str, variant: str) -> bool:
    return any(name == n and part in variant for n, part in DEVIATES) or (
        "sample" in variant and name in NO_SAMPLE
    )


@pytest.mark.parametrize(
    ("name", "class_name", "change", "eta", "variant"),
    [
        (*case, variant)
        for case in PARITY
        for variant in VARIANTS
        if case[0] not in COSTLY or variant in ("leading", "linspace, v", "begin, karras", "trailing, few")
    ],
)
def test_table_equals_diffusers(name, class_name, change, eta, variant, worst):
    if wrong_in_diffusers(name, variant):
        pytest.skip("diffusers cannot, or is wrong: see DEVIATES")
    varied, steps, begin = VARIANTS[variant]
    config = {**BASE, **varied, **change}
    ours = by_table(BUILTIN[name], config, steps, begin, eta=eta)
    error = relative(ours, by_diffusers(class_name, config, steps, begin, eta))
    assert note(worst["diffusers"], name, error) < 1e-4


@pytest.mark.parametrize("variant", ["leading", "linspace, v", "begin, karras", "trailing, few", "one step"])
@pytest.mark.parametrize("name", BUILTIN)
def test_table_equals_function(name, variant, worst):
    varied, steps, begin = VARIANTS[variant]
    table = by_table(BUILTIN[name], {**BASE, **varied}, steps, begin, dtype=torch.float64)
    error = relative(table, by_function(BUILTIN[name], {**BASE, **varied}, steps, begin))
    assert note(worst["function"], name, error) < 1e-10


@pytest.mark.parametrize("word", CURVES)
@pytest.mark.parametrize("name", [s.name for s in TABLE if "sigmas" in s.options])
def test_every_sigma_schedule_runs(name, word):
    table = by_table(BUILTIN[name], BASE, 8, dtype=torch.float64, sigmas=word)
    assert relative(table, by_function(BUILTIN[name], BASE, 8, sigmas=word)) < 1e-10


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "tcd", "euler", "euler_a", "dpm_multistep", "unipc"])
def test_zero_terminal_snr_equals_diffusers(name, spacing):
    """The DDIM family keeps an exact zero, the others clamp; all start from noise alone at timestep 999."""
    config = {
        **BASE,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": spacing,
        "prediction_type": "v_prediction",
    }
    eta = 0.3 if name == "tcd" else None
    theirs = by_diffusers(BUILTIN[name].diffusers, config, 20, eta=eta)
    assert relative(by_table(BUILTIN[name], config, 20, eta=eta), theirs) < 1e-4
    program = BUILTIN[name].program(config, 20)
    assert program.timesteps[0] == 999 and program.call_sigma[0] > 4000


@pytest.mark.parametrize("scheduler", [s for s in TABLE if s.keeps == "x0"], ids=lambda s: s.name)
def test_many_steps_stay_exact(scheduler):
    """Nothing wears out over a long walk: 50 steps of image to image, function against table."""
    table = by_table(scheduler, BASE, 50, 10, dtype=torch.float64)
    assert relative(table, by_function(scheduler, BASE, 50, 10)) < 1e-10


def test_every_class_of_the_table_is_compared():
    known = {s.diffusers for s in TABLE if s.diffusers}
    # DPMSolverSDEScheduler takes no generator: see test_stages
    assert known - {c for _, c, _, _ in PARITY} == {"DPMSolverSDEScheduler"}
    assert all(hasattr(diffusers, c) for c in known)


@pytest.mark.parametrize("scheduler", TABLE, ids=lambda s: s.name)
def test_calls_a_step(scheduler):
    program = scheduler.program(BASE, 20)
    # the last of two-stage samplers is Euler's; PNDM doubles the first
    assert len(program) == {1: 20, 2: 39}[scheduler.calls] + (scheduler.name == "pndm")


# -- names


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("euler", "euler"),
        ("Euler a", "euler_a"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("dpmpp_2m_karras", "dpmpp_2m_karras"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde_exponential"),
        ("euler sgm uniform", "euler_sgm_uniform"),
        ("UniPCMultistepScheduler", "unipc"),
        ("sample_dpmpp_3m_sde", "dpmpp_3m_sde"),
        ("plms", "pndm"),
        ("model", "dpm_multistep"),
    ],
)
def test_names_resolve(name, ours):
    config = {**BASE, "_class_name": "DPMSolverMultistepScheduler"}
    assert resolve(name, config).name == ours
    assert resolve(name, config) is resolve(name, config)  # so that its programs are remembered
    assert name in names_of(plugins.build([], Path())).schedulers  # what jobs and rows may say


def test_a_name_with_karras_is_that_schedule_whatever_the_checkpoint_says():
    config = {**BASE, "use_exponential_sigmas": True}
    ours = by_table(resolve("DPM++ 2M Karras", config), config, 12)
    theirs = by_diffusers("DPMSolverMultistepScheduler", {**BASE, "use_karras_sigmas": True}, 12)
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["dpm", "DDIM Karras", "model"])
def test_unknown_names_list_the_known(name):
    with pytest.raises(UsageError, match="is unknown; have model, .*ddim, .*euler_a, .*karras"):
        resolve(name, {**BASE, "_class_name": "FlowMatchEulerDiscreteScheduler"})


def test_two_owners_of_a_name_are_both_named():
    mine = Scheduler("mine", BUILTIN["euler"].sampler, aliases=("DDIM",))
    with pytest.raises(UsageError, match="'ddim' and 'mine' both claim the name 'DDIM'"):
        names([*TABLE, mine])


def test_a_plugin_is_found_by_its_names():
    mine = Scheduler("mine", BUILTIN["euler"].sampler, aliases=("My Own",))
    assert resolve("my own", BASE, {**BUILTIN, "mine": mine}) is mine


@pytest.mark.parametrize("class_name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_model_means_what_diffusers_loads(class_name, tmp_path):
    """From a config file as diffusers writes it, with every default spelt out."""
    getattr(diffusers, class_name).from_config(BASE).save_config(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert relative(by_table(resolve("model", config), config, 10), by_diffusers(class_name, BASE, 10)) < 1e-4


def test_another_class_on_a_saved_config_keeps_its_settings(tmp_path):
    diffusers.PNDMScheduler.from_config(BASE).save_config(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    loaded = diffusers.PNDMScheduler.from_pretrained(tmp_path)
    theirs = by_diffusers("EulerDiscreteScheduler", loaded.config, 10)
    assert relative(by_table(BUILTIN["euler"], config, 10), theirs) < 1e-4


def test_absent_keys_mean_the_class_defaults():
    """Old files lack timestep_spacing, so that the class decides: DDIM leading, Euler linspace."""
    old = {k: v for k, v in BASE.items() if k not in ("timestep_spacing", "prediction_type")}
    schedule = NoiseSchedule.from_config(old)
    assert BUILTIN["ddim"].program(schedule, 10).timesteps.tolist() == [901 - 100 * i for i in range(10)]
    assert BUILTIN["euler"].program(schedule, 10).timesteps.tolist() == [999 - 111 * i for i in range(10)]
