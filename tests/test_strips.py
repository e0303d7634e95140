"""Strips beside diffusers' own estimate of the clean picture, and as a user gets them."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from batchsd.cli import commands
from batchsd.defaults import register_schedulers, register_tasks
from batchsd.engine import Engine, Settings
from batchsd.model.checkpoint import load
from batchsd.strips import SHOWN, TooSlow, step, strip
from batchsd.testing import example_request
from batchsd.types import Request, Shard

SHARD = Shard(1, 0, 1, 0, 0, 1)
FOUND = SimpleNamespace(shard=SHARD, row=SimpleNamespace(ours={"image": None}))


def engine_of(checkpoint: Path, **config: object) -> Engine:
    """One that draws with the checkpoint; `config` over its scheduler's."""
    model = load(checkpoint, "float32", "cpu")
    model = replace(model, scheduler_config={**model.scheduler_config, **config})
    tools = {"schedulers": register_schedulers(), "tasks": register_tasks(), "encode": lambda picture: (b"x", "png")}
    return Engine(model, **tools, settings=Settings(lanes=4))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return engine_of(checkpoint)


def asked(scheduler: str, steps: int, guidance: float = 1.0) -> Request:
    values = {"scheduler": scheduler, "steps": steps, "guidance_scale": guidance, "height": 16, "width": 16}
    return example_request(prompt="a red cube", **values)


def believed(engine: Engine, scheduler: str, steps: int) -> list[torch.Tensor]:
    """Our estimates at each call but the last."""
    row = engine.condition(SHARD, asked(scheduler, steps))
    engine.add_contexts([row])
    lanes = engine.new_lanes(engine.group(row))
    lanes.admit(row)
    found = [step(engine, lanes, row) for _ in range(len(row.program))]
    assert [clean is None for clean, _ in found] == [False] * (len(found) - 1) + [True]
    assert [last is None for _, last in found] == [True] * (len(found) - 1) + [False]
    return [clean for clean, _ in found if clean is not None]


@pytest.mark.parametrize(("ours", "theirs"), [("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler")])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_estimates_are_diffusers_own(checkpoint: Path, ours: str, theirs: str, kind: str) -> None:
    """`pred_original_sample` of each step of diffusers' class, given the same start and the same U-Net."""
    import diffusers

    engine = engine_of(checkpoint, prediction_type=kind)
    found = believed(engine, ours, 6)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint)
    scheduler = getattr(diffusers, theirs).from_config(engine.model.scheduler_config)
    scheduler.set_timesteps(6)
    x = engine.condition(SHARD, asked(ours, 6)).conditioning.noise_CHW[None] * scheduler.init_noise_sigma
    states, _ = pipe.encode_prompt("a red cube", "cpu", 1, False)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps[:-1]):
            out = pipe.unet(scheduler.scale_model_input(x, t), t, encoder_hidden_states=states).sample
            stepped = scheduler.step(out, t, x)
            torch.testing.assert_close(found[i], stepped.pred_original_sample, rtol=2e-4, atol=2e-4)
            x = stepped.prev_sample


@pytest.mark.parametrize(("scheduler", "steps"), [("dpmpp_2m", 20), ("heun", 5), ("pndm", 9), ("lcm", 2)])
def test_a_strip_goes_from_noise_to_the_run_s_picture(engine: Engine, scheduler: str, steps: int) -> None:
    request, drawn = asked(scheduler, steps, 3.0), []
    engine.encode = lambda picture: (drawn.append(picture) or b"x", "png")
    ((_, record),) = engine.generate([(SHARD, iter([request]))])
    assert record.status == "ok"
    made = strip(engine, request, FOUND, None)
    labels = [label for label, _ in made.frames]
    assert labels[0] == "start" and labels[-1] == "picture" and len(labels) == 2 + min(SHOWN, made.calls - 1)
    assert np.abs(made.frames[-1][1].astype(int) - drawn[0]).max() <= 1
    assert all(picture.shape == (16, 16, 3) for _, picture in made.frames)


def test_what_would_take_too_long_is_not_drawn(engine: Engine) -> None:
    with pytest.raises(TooSlow, match="would take about"):
        strip(engine, asked("ddim", 50), FOUND, 0.0)


def test_report_of_a_run_by_its_command(checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    samplers = ["ddim", "euler", "lms"]
    table = {"id": [f"row{i}" for i in range(6)], "prompt": ["a red cube"] * 6, "scheduler": samplers * 2}
    pq.write_table(pa.table(table), tmp_path / "prompts.parquet")
    (tmp_path / "job.toml").write_text(
        f'[input]\nmanifest = "prompts.parquet"\n[model]\npath = "{model}"\ndevice = "cpu"\n'
        '[sampler]\nsteps = 12\nheight = 16\nwidth = 16\n[output]\nuri = "run"\n'
    )

    def batchsd(*words: str) -> str:
        result = CliRunner().invoke(commands, list(words), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return (tmp_path / "run/report.html").read_text()

    at_end = batchsd("run", str(tmp_path / "job.toml"), "--local")
    assert 'class="strip"' not in at_end and "`batchsd report RUN` draws" in at_end
    page = batchsd("report", str(tmp_path / "run"))
    assert page.count('class="strip"') == 3 and page.count("within 0/255 of the run") == 3
    assert sorted(re.findall(r"row\d</bdi>: (\w+), 12 steps", page)) == samplers
    shutil.rmtree(model)
    gone = batchsd("report", str(tmp_path / "run"))
    assert 'class="strip"' not in gone and "Left out: " in gone and str(model) in gone
