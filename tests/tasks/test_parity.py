"""Every conditioning task against diffusers' own pipeline, on small random checkpoints."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from batchsd.defaults import register_tasks
from batchsd.diffusion.builtin import BUILTIN
from batchsd.engine import Engine, Settings
from batchsd.model.checkpoint import load
from batchsd.types import Record, Request, Shard
from tests.conftest import write_checkpoint

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
ALL_SCHEDULERS = {**SCHEDULERS, "euler_a": "EulerAncestralDiscreteScheduler"}
PROMPT, NEGATIVE = "a red cube, left of a blue sphere", "green"


def picture(width: int = 32, height: int = 24, seed: int = 0) -> Image.Image:
    """Soft random colours: what a VAE of random weights can still tell apart."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def mask(width: int = 32, height: int = 24) -> Image.Image:
    """A soft disc left of the middle."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.clip(255 * (1.5 - np.hypot(x - 10, y - 12) / 8), 0, 255).astype(np.uint8))


@cache
def engine(folder: Path) -> Engine:
    return Engine(
        load(folder), schedulers=BUILTIN, tasks=register_tasks(), encode=lambda p: (p.tobytes(), "raw"),
        settings=Settings(lanes=16),
    )  # fmt: skip


def request(task: str, **changes: object) -> Request:
    values: dict = {
        "key": "r0", "index": 0, "repeat_index": 0, "prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": 7,
        "steps": 7, "guidance_scale": 5.0, "height": None, "width": None, "scheduler": "ddim", "task": task,
        "inputs": {}, "columns": pa.table({"id": ["x"]}), **changes,
    }  # fmt: skip
    return Request(**values)


def draw(drawer: Engine, *rows: Request) -> list[Record]:
    shard = Shard(1, 0, 1, 0, 0, len(rows))
    found = {record.request.key: record for _, record in drawer.generate([(shard, iter(rows))])}
    return [found[row.key] for row in rows]


def pixels(record: Record) -> np.ndarray:
    assert record.status == "ok" and record.image and record.height and record.width, record.error
    return np.frombuffer(record.image, np.uint8).reshape(record.height, record.width, 3).astype(int)


@cache
def text_pipeline(folder: Path):
    import diffusers

    return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def pipeline(kind: str, folder: Path, scheduler: str, **more: object):
    """diffusers' pipeline of that class over a folder that another one wrote."""
    import diffusers

    whole = text_pipeline(folder)
    parts = {name: getattr(whole, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    kept = getattr(diffusers, ALL_SCHEDULERS[scheduler]).from_config(whole.scheduler.config)
    if kind != "StableDiffusionDepth2ImgPipeline":
        more |= {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    pipe = getattr(diffusers, kind)(**parts, scheduler=kept, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, asked: Request, **inputs: object) -> np.ndarray:
    drawn = pipe(
        asked.prompt, negative_prompt=asked.negative_prompt, guidance_scale=asked.guidance_scale,
        num_inference_steps=asked.steps, generator=torch.Generator().manual_seed(asked.seed), output_type="np",
        **inputs,
    ).images[0]  # fmt: skip
    return drawn * 255


def agree(ours: np.ndarray, other: np.ndarray) -> None:
    assert ours.shape == other.shape
    assert ours.std() > 3, "a flat picture would equal anything flat"
    assert np.abs(ours - other).max() <= 1.0


@pytest.fixture(scope="module")
def inpaint_checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("inpaint"), in_channels=9)


@pytest.fixture(scope="module")
def depth_checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("depth"), in_channels=5)


@pytest.fixture(scope="module")
def edit_checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("edit"), in_channels=8)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.3, 0.55, 0.8, 1.0])
def test_image(checkpoint: Path, scheduler: str, strength: float) -> None:
    asked = request("image", scheduler=scheduler, inputs={"init_image": png(picture()), "strength": strength})
    (record,) = draw(engine(checkpoint), asked)
    pipe = pipeline("StableDiffusionImg2ImgPipeline", checkpoint, scheduler)
    agree(pixels(record), theirs(pipe, asked, image=picture(), strength=strength))


def test_image_with_noise_in_every_step(checkpoint: Path) -> None:
    """And a picture that is no multiple of 8, which diffusers stretches."""
    inputs = {"init_image": png(picture(33, 27)), "resize": "stretch"}
    asked = request("image", scheduler="euler_a", guidance_scale=1.0, inputs=inputs)
    (record,) = draw(engine(checkpoint), asked)
    pipe = pipeline("StableDiffusionImg2ImgPipeline", checkpoint, "euler_a")
    agree(pixels(record), theirs(pipe, asked, image=picture(33, 27), strength=0.8))


@pytest.mark.parametrize(
    ("scheduler", "strength"),
    [("ddim", 1.0), ("ddim", 0.5), ("euler", 0.5), ("dpmpp_2m", 1.0), ("euler_a", 1.0), ("euler_a", 0.5)],
)
@pytest.mark.parametrize("kind", [4, 9])
def test_inpaint(
    checkpoint: Path, inpaint_checkpoint: Path, kind: int, scheduler: str, strength: float
) -> None:
    """The ancestral sampler draws after the task has: the same pictures mean the same number of draws."""
    folder = checkpoint if kind == 4 else inpaint_checkpoint
    inputs = {"init_image": png(picture()), "mask": png(mask()), "strength": strength}
    asked = request("inpaint", scheduler=scheduler, inputs=inputs)
    (record,) = draw(engine(folder), asked)
    pipe = pipeline("StableDiffusionInpaintPipeline", folder, scheduler)
    other = theirs(
        pipe, asked, image=picture(), mask_image=mask(), strength=strength, height=24, width=32,
    )  # fmt: skip
    agree(pixels(record), other)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_depth(depth_checkpoint: Path, scheduler: str, strength: float) -> None:
    depth_HW = np.random.default_rng(1).normal(100, 30, (48, 64)).astype(np.float32)
    file = io.BytesIO()
    np.save(file, depth_HW)
    inputs = {"init_image": png(picture()), "depth": file.getvalue(), "strength": strength}
    asked = request("depth", scheduler=scheduler, inputs=inputs)
    (record,) = draw(engine(depth_checkpoint), asked)
    pipe = pipeline(
        "StableDiffusionDepth2ImgPipeline",
        depth_checkpoint,
        scheduler,
        depth_estimator=None,
        feature_extractor=None,
    )
    other = theirs(
        pipe, asked, image=picture(), depth_map=torch.from_numpy(depth_HW)[None], strength=strength
    )
    agree(pixels(record), other)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize(("guidance", "image_guidance"), [(7.0, 1.5), (4.0, 1.0), (1.0, 1.5), (4.0, 0.5)])
def test_edit(edit_checkpoint: Path, scheduler: str, guidance: float, image_guidance: float) -> None:
    inputs = {"init_image": png(picture()), "image_guidance_scale": image_guidance}
    asked = request("edit", scheduler=scheduler, guidance_scale=guidance, inputs=inputs)
    (record,) = draw(engine(edit_checkpoint), asked)
    pipe = pipeline("StableDiffusionInstructPix2PixPipeline", edit_checkpoint, scheduler)
    agree(pixels(record), theirs(pipe, asked, image=picture(), image_guidance_scale=image_guidance))
