"""Tables against diffusers' own objects, run as its pipelines run them; the contract; pictures; what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import batchsd_diffusers_scheduler as plugin
import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from batchsd_diffusers_scheduler import CLASSES, REFUSED, from_diffusers
from PIL import Image

from batchsd import UsageError
from batchsd.cli import main
from batchsd.diffusion.walk import run_program
from batchsd.plugins import describe
from batchsd.testing import check_scheduler, consistency

SHAPE = (1, 4, 6, 6)
BASE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
    "set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False, "timestep_spacing": "leading",
}  # fmt: skip
"""The hub's scheduler_config.json of SD 1.5."""

V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
COSTLY = ("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler")  # in diffusers
TWINS = ("DDIMParallelScheduler", "DDPMParallelScheduler")


def heavy_if(heavy: bool, *case: Any) -> Any:
    return pytest.param(*case, marks=[pytest.mark.heavy] * heavy)


CASES: list[Any] = [  # (class, what is changed, steps, begin)
    *((name, {}, 10, 0) for name in CLASSES),
    # SASolver's add_noise is of the rounded timestep, its walk is not; PNDM mixes v's of several levels
    *(heavy_if(name in COSTLY + TWINS, name, {}, 12, 5) for name in CLASSES if name != "SASolverScheduler"),
    *(
        heavy_if(name in COSTLY + TWINS, name, {**V, "timestep_spacing": "trailing"}, 7, 0)
        for name in CLASSES
        if name != "PNDMScheduler"
    ),
    ("DDIMScheduler", ZERO_SNR, 8, 0),
    ("EulerDiscreteScheduler", ZERO_SNR, 8, 0),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "sample"}, 9, 0),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}, 9, 0),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, 9, 0),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, 9, 0),  # the built-in refuses these three
    ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}, 9, 0),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", **V}, 9, 0),
    ("DEISMultistepScheduler", {"solver_order": 3}, 9, 0),
    ("SASolverScheduler", {"predictor_order": 3, "corrector_order": 4}, 9, 0),
]


def network(x: torch.Tensor, t: float) -> torch.Tensor:
    """A smooth nonlinear stand-in, the same in any precision."""
    mixed = 0.6 * x + 0.3 * x.roll(1, dims=1) - 0.2 * x.roll(1, dims=-1)
    return torch.tanh(mixed + 0.3 * np.sin(t / 200)) * (0.7 + t / 4000)


def draws() -> tuple[torch.Generator, Any]:
    generator = torch.Generator().manual_seed(0)
    return generator, lambda: torch.randn(SHAPE, generator=generator)


def by_diffusers(scheduler: Any, steps: int, begin: int) -> torch.Tensor:
    """The loop of diffusers' pipelines on plain float32 tensors; image to image if `begin`."""
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[begin * scheduler.order :]
    generator, draw = draws()
    if begin:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * scheduler.order)
        x = scheduler.add_noise(draw() * 0.5, draw(), timesteps[:1])
    else:
        x = draw() * scheduler.init_noise_sigma
    extra = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in timesteps:
        output = network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(output, t, x, **extra)[0]
    return x


def by_table(scheduler: Any, config: dict[str, Any], steps: int, begin: int) -> torch.Tensor:
    program = scheduler.program(config, steps, begin)
    _, draw = draws()
    if begin:
        x = program.init_alpha * draw() * 0.5 + program.init_sigma * draw()
    else:
        x = program.init_noise * draw()
    return run_program(program, network, x.double(), lambda: draw().double())


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(("name", "change", "steps", "begin"), CASES)
def test_table_equals_the_object(name: str, change: dict[str, Any], steps: int, begin: int) -> None:
    config = {**BASE, **change}
    scheduler = from_diffusers(name, getattr(diffusers, name))
    theirs = by_diffusers(getattr(diffusers, name).from_config(config), steps, begin)
    # diffusers computes in float32, where a start at sigma 4096 costs digits (DDIM has none there: alpha is 0).
    bound = 1e-4 if change is ZERO_SNR and name != "DDIMScheduler" else 5e-6
    assert relative(by_table(scheduler, config, steps, begin), theirs) < bound


DISTILLED = {"diffusers:LCMScheduler": {"clean": consistency, "steps": 50},
             "diffusers:TCDScheduler": {"steps": 50, "tolerance": 0.15}}  # fmt: skip


# a second each, and their tables are compared above
LONG = ("DEISMultistepScheduler", "HeunDiscreteScheduler", "SASolverScheduler", "UniPCMultistepScheduler")


@pytest.mark.parametrize("name", [heavy_if(name in COSTLY + TWINS + LONG, f"diffusers:{name}") for name in CLASSES])
def test_contract(name: str) -> None:
    check_scheduler(plugin.register_schedulers()[name], **DISTILLED.get(name, {}))


def test_every_class_of_diffusers_is_a_table_or_refused() -> None:
    known = {name for name in dir(diffusers) if name.endswith("Scheduler") and name != "Scheduler"}
    assert {*CLASSES, *REFUSED} == known and not set(CLASSES) & set(REFUSED)
    brought = plugin.register_schedulers()
    assert {name for name, scheduler in brought.items() if not scheduler.refused} == {f"diffusers:{n}" for n in CLASSES}


def test_they_are_listed_as_what_they_are() -> None:
    listed = {row["name"]: row["kind"] for row in describe(["batchsd_diffusers_scheduler"], Path())}
    assert {listed[f"diffusers:{name}"] for name in CLASSES} == {"scheduler"}
    assert {listed[f"diffusers:{name}"] for name in REFUSED} == {"refused"}


# These two would trace: they walk the other way, or another model's schedule. Two more want torchsde to be there.
TRACEABLE = ("CogVideoXDDIMScheduler", "DPMSolverMultistepInverseScheduler")
NEED_TORCHSDE = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in (*TRACEABLE, *NEED_TORCHSDE)])
def test_what_is_refused_cannot_be_traced(name: str) -> None:
    scheduler = from_diffusers(name, getattr(diffusers, name))
    with pytest.raises(UsageError, match=f"'{name}' cannot run as a table: diffusers' {name} "):
        scheduler.program(BASE, 5)


# -- a scheduler of one's own


class Mine(diffusers.EulerDiscreteScheduler):
    """Euler, with one thing done to the latent after each step."""

    does: Any = staticmethod(lambda x: x)

    def step(self, *args: Any, **options: Any) -> Any:
        return (self.does(super().step(*args, **options)[0]),)


NONLINEAR = {
    "clips": (lambda x: torch.clamp(x, -1, 1), "Mine applies torch.clamp to a latent"),
    "clips in place": (lambda x: x.clamp_(-1, 1), "Mine uses 'clamp_' of a latent"),
    "multiplies": (lambda x: x * x, "Mine multiplies or divides latents with each other"),
    "asks": (lambda x: x if x > 0 else -x, "Mine compares latents, so that its path depends on the picture"),
    "own noise": (lambda x: x + 0.1 * torch.rand(1, 4, 8, 8), "Mine mixes a latent with a tensor that is not made of"),
    "constant": (lambda x: x + 1.0, "Mine adds a constant to a latent"),
    "forgets": (lambda x: torch.zeros(1, 4, 8, 8), "Mine gives back what is not made of the latent"),
}


@pytest.mark.parametrize("case", NONLINEAR)
def test_what_is_not_linear_is_refused_by_name(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    does, words = NONLINEAR[case]
    monkeypatch.setattr(Mine, "does", staticmethod(does))
    with pytest.raises(UsageError) as error:
        from_diffusers("mine", Mine).program(BASE, 5)
    assert str(error.value).startswith("scheduler 'mine' cannot run as a table: ") and words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_linear_one_of_ones_own_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mine, "does", staticmethod(lambda x: 0.99 * x))
    theirs = by_diffusers(Mine.from_config(BASE), 10, 0)
    assert relative(by_table(from_diffusers("mine", Mine), BASE, 10, 0), theirs) < 2e-6


def test_an_object_keeps_its_settings_and_takes_the_checkpoints_process() -> None:
    given = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, solver_order=3, beta_schedule="linear")
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(
        {**given.config, **{key: BASE[key] for key in ("beta_schedule", "beta_start", "beta_end")}}
    )
    assert relative(by_table(from_diffusers("mine", given), BASE, 9, 0), by_diffusers(theirs, 9, 0)) < 2e-6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (diffusers.DDIMScheduler(clip_sample=True), "DDIMScheduler has clip_sample on: clipping is not linear"),
        (diffusers.DPMSolverMultistepScheduler(thresholding=True), "has thresholding on: dynamic thresholding is not"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "has use_flow_sigmas on: flow matching: it walks"),
        (diffusers.PNDMScheduler(skip_prk_steps=False), "needs more at network call"),
    ],
)
def test_settings_that_no_table_holds(given: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        from_diffusers("mine", given).program(BASE, 8)


def test_the_jobs_words_are_diffusers_settings() -> None:
    scheduler = from_diffusers("mine", diffusers.EulerDiscreteScheduler)
    assert scheduler.options == {"spacing": "", "sigmas": "", "final_sigma": ""}
    said = scheduler.program(BASE, 9, spacing="trailing", sigmas="karras", final_sigma="sigma_min")
    config = {**BASE, "timestep_spacing": "trailing", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    assert (said.packed == scheduler.program(config, 9).packed).all()
    assert from_diffusers("tcd", diffusers.TCDScheduler).options == {"spacing": "", "eta": 0.3}
    for words, options in (("no is not supported", {"spacing": "no"}), ("diffusers has karras", {"sigmas": "no"})):
        with pytest.raises(UsageError, match=words):
            scheduler.program(BASE, 9, **options)


# -- whole pictures, by the command


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr("sys.argv", ["batchsd", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


DRAWN = [name for name in CLASSES if "Parallel" not in name]


def test_pictures_are_those_of_our_own_samplers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of rows on diffusers' objects and on our samplers of the same classes: within 1/255."""
    said = [*DRAWN, *(f"diffusers:{name}" for name in DRAWN), "diffusers:FlowMatchEulerDiscreteScheduler"]
    rows = {"prompt": ["a large red cube, white floor"] * len(said), "scheduler": said, "seed": [5] * len(said)}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    (tmp_path / "job.toml").write_text(
        'plugins = ["batchsd_diffusers_scheduler"]\n[input]\nmanifest = "rows.parquet"\n[model]\npath = "tiny-scenes"\n'
        '[sampler]\nsteps = 6\n[output]\nuri = "out"\n[run]\nmax_failed = 1\n'
    )
    assert command(monkeypatch, "run", str(tmp_path / "job.toml"), "--local") == 0
    table = pq.ParquetDataset(tmp_path / "out" / "data").read()
    assert table["status"].to_pylist() == ["ok"] * (len(said) - 1) + ["bad_input"]
    assert table["error"][-1].as_py().endswith(f"cannot run as a table: {plugin.ANOTHER}")
    cells = table["image"].to_pylist()[:-1]
    drawn = np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"]))).astype(int) for cell in cells])
    ours, theirs = drawn[: len(DRAWN)], drawn[len(DRAWN) :]
    worst = dict(zip(DRAWN, np.abs(ours - theirs).max((1, 2, 3)).tolist(), strict=True))
    assert max(worst.values()) <= 1, worst
    assert len({picture.tobytes() for picture in theirs}) > len(DRAWN) / 2  # and they differ among themselves


def test_a_job_that_names_what_is_refused_ends_at_once(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    pq.write_table(pa.table({"prompt": ["a cube"]}), tmp_path / "rows.parquet")
    (tmp_path / "job.toml").write_text(
        'plugins = ["batchsd_diffusers_scheduler"]\n[input]\nmanifest = "rows.parquet"\n[model]\npath = "tiny-scenes"\n'
        '[sampler]\nscheduler = "diffusers:DPMSolverSDEScheduler"\n[output]\nuri = "out"\n'
    )
    assert command(monkeypatch, "run", str(tmp_path / "job.toml"), "--local") == 2
    words = "'diffusers:DPMSolverSDEScheduler' cannot run as a table: its noise is not the row's generator's"
    assert words in capsys.readouterr().err
