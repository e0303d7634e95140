"""SDXL's whole pictures against diffusers' pipelines: what a row says of sizes and crops, and the negative prompt."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchsd.types import Request
from tests.tasks.test_parity import agree, draw, engine, picture, pixels, png, request
from tests.tasks.xl import write_xl

SIZES: dict[str, tuple[int, int]] = {
    "original_size": (900, 1300), "crops_coords_top_left": (70, 30), "target_size": (1024, 768),
}  # fmt: skip
ROWS: dict[str, tuple[str | None, dict[str, tuple[int, int]]]] = {
    "no negative": (None, {}),
    "an empty negative": ("", {}),
    "a negative": ("green, blurry", {}),
    "sizes": (None, SIZES),
    "a crop": ("green", {"crops_coords_top_left": (512, 0)}),
}


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_xl(tmp_path_factory.mktemp("xl"))


@cache
def pipeline(kind: str, folder: Path) -> Any:
    import diffusers

    pipe = getattr(diffusers, kind).from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, asked: Request, **inputs: object) -> np.ndarray:
    found = pipe(
        asked.prompt, negative_prompt=asked.negative_prompt, guidance_scale=asked.guidance_scale,
        num_inference_steps=asked.steps, generator=torch.Generator().manual_seed(asked.seed), output_type="np",
        **inputs,
    )  # fmt: skip
    return found.images[0] * 255


def xl_request(task: str, name: str, **inputs: object) -> Request:
    negative, sizes = ROWS[name]
    told = {column: list(pair) for column, pair in sizes.items()}
    return request(task, key=name, negative_prompt=negative, scheduler="model", steps=4, inputs={**inputs, **told})


@pytest.mark.parametrize("name", ROWS)
def test_text_equals_diffusers(xl: Path, name: str) -> None:
    asked = xl_request("text", name)
    pipe = pipeline("StableDiffusionXLPipeline", xl)
    (record,) = draw(engine(xl), asked)
    agree(pixels(record), theirs(pipe, asked, height=16, width=16, **ROWS[name][1]))


@pytest.mark.parametrize("name", ["no negative", "sizes"])
def test_image_equals_diffusers(xl: Path, name: str) -> None:
    asked = xl_request("image", name, init_image=png(picture()), strength=0.6)
    pipe = pipeline("StableDiffusionXLImg2ImgPipeline", xl)
    (record,) = draw(engine(xl), asked)
    agree(pixels(record), theirs(pipe, asked, image=picture(), strength=0.6, **ROWS[name][1]))


def test_rows_of_different_sizes_share_a_batch(xl: Path) -> None:
    """And each is told its own: all are other pictures, and each is what it is alone."""
    asked = [xl_request("text", name) for name in ROWS]
    drawer = engine(xl)
    together = [pixels(record) for record in draw(drawer, *asked)]
    for row, found in zip(asked, together, strict=True):
        (alone,) = draw(drawer, row)
        assert np.abs(found - pixels(alone)).max() <= 1
    for i, one in enumerate(together):
        assert all(np.abs(one - other).max() > 2 for other in together[:i])


def test_a_checkpoint_without_zeros_encodes_the_empty_text(tmp_path: Path) -> None:
    folder = write_xl(tmp_path / "xl", force_zeros_for_empty_prompt=False)
    given, left_out = (xl_request("text", name) for name in ("an empty negative", "no negative"))
    one, other = draw(engine(folder), given, left_out)
    assert np.array_equal(pixels(one), pixels(other))
    agree(pixels(other), theirs(pipeline("StableDiffusionXLPipeline", folder), left_out, height=16, width=16))
