"""Depth rows whose map the checkpoint's own network makes, and those that it cannot make one for."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from batchsd.model.checkpoint import Model
from batchsd.tasks.depth import DepthTask, depth_channel
from batchsd.testing.tasks import TinyModel, example_request
from batchsd.types import RowError
from tests.conftest import write_checkpoint
from tests.model.test_depth import HYBRID, write_depth_estimator

from .test_parity import agree, draw, engine, picture, pipeline, pixels, png, request, theirs


@pytest.fixture(scope="module")
def with_estimator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("depth"), in_channels=5)
    write_depth_estimator(folder, HYBRID)
    return folder


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_an_estimated_map_draws_as_in_diffusers(with_estimator: Path, strength: float) -> None:
    from transformers import DPTForDepthEstimation
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    asked = request("depth", scheduler="ddim", inputs={"init_image": png(picture()), "strength": strength})
    (record,) = draw(engine(with_estimator), asked)
    pipe = pipeline(
        "StableDiffusionDepth2ImgPipeline", with_estimator, "ddim",
        depth_estimator=DPTForDepthEstimation.from_pretrained(with_estimator / "depth_estimator"),
        feature_extractor=DPTImageProcessorPil.from_pretrained(with_estimator / "feature_extractor"),
    )  # fmt: skip
    agree(pixels(record), theirs(pipe, asked, image=picture(), strength=strength))
    flat = request("depth", scheduler="ddim", inputs={**asked.inputs, "depth": png(Image.new("L", (8, 8)))})
    assert np.abs(pixels(draw(engine(with_estimator), flat)[0]) - pixels(record)).max() > 3, "the map is seen"


def test_the_network_is_built_for_the_row_that_needs_it(with_estimator: Path) -> None:
    drawer = engine(with_estimator)
    assert isinstance(drawer.model, Model) and drawer.model.depth is not None
    drawer.model.depth.network = None
    given = request("depth", inputs={"init_image": png(picture()), "depth": png(picture(seed=3))})
    assert draw(drawer, given)[0].status == "ok" and drawer.model.depth.network is None
    assert draw(drawer, request("depth", inputs={"init_image": png(picture(seed=9))}))[0].status == "ok"
    assert drawer.model.depth.network is not None


def test_the_two_conventions_differ_where_the_aspect_does(with_estimator: Path) -> None:
    """A picture of 64 x 24 is squashed to 64 x 64 by one, and 64 x 32 in the other's net."""
    inputs = {"init_image": png(picture(64, 24))}
    one, two = (
        pixels(draw(engine(with_estimator), request("depth", inputs={**inputs, "depth_convention": name}))[0])
        for name in ("diffusers", "stability")
    )
    assert np.abs(one - two).max() > 1


def test_a_kept_map_is_the_one_that_was_used(with_estimator: Path) -> None:
    inputs = {"init_image": png(picture()), "keep_depth": True}
    (record,) = draw(engine(with_estimator), request("depth", inputs=inputs))
    kept = Image.open(io.BytesIO(record.made["estimated_depth"]))
    assert kept.mode == "I;16" and kept.size == (64, 64)
    values = np.asarray(kept)
    assert values.min() == 0 and values.max() == 65535
    given = {"init_image": png(picture()), "depth": record.made["estimated_depth"], "resize": "stretch"}
    (again,) = draw(engine(with_estimator), request("depth", inputs=given))
    assert np.abs(pixels(again) - pixels(record)).max() <= 1 and not again.made
    assert not draw(engine(with_estimator), request("depth", inputs={"init_image": png(picture())}))[0].made


def test_depth_alone_starts_from_noise() -> None:
    """The map's place is the row's size; `strength` has nothing to keep."""
    row = example_request(task="depth", inputs={"depth": png(picture()), "strength": 0.3}, height=64, width=96)
    found = DepthTask()(row, TinyModel(extra_channels=1), torch.Generator().manual_seed(7))
    assert found.clean_CHW is None and found.begin == 0
    assert torch.equal(found.noise_CHW, torch.randn((1, 4, 8, 12), generator=torch.Generator().manual_seed(7))[0])
    grey = np.asarray(picture().convert("L"), np.float32)
    channel = depth_channel(grey, (8, 12), "crop")
    for branch in found.branches:
        assert branch.channels_CHW is not None and torch.equal(branch.channels_CHW, channel)


class NoEstimator(TinyModel):
    def estimate_depth(self, picture_HW3: np.ndarray, convention: str = "diffusers") -> None:
        return None


class Broken(TinyModel):
    def estimate_depth(self, picture_HW3: np.ndarray, convention: str = "diffusers") -> np.ndarray:
        return np.full((4, 4), np.nan, np.float32)


NAN = io.BytesIO()
np.save(NAN, np.array([[0, np.nan], [1, 2]], np.float32))
INFINITE = io.BytesIO()
np.save(INFINITE, np.array([[0, np.inf], [1, 2]], np.float32))
IMAGE = png(picture())


@pytest.mark.parametrize(
    ("model", "inputs", "status", "message"),
    [
        (NoEstimator, {"init_image": IMAGE}, "bad_input", "no depth estimator"),
        (TinyModel, {}, "bad_input", "no init_image to estimate it from"),
        (TinyModel, {"init_image": IMAGE, "depth_convention": "zoe"}, "bad_input", "have diffusers, stability"),
        (TinyModel, {"init_image": IMAGE, "keep_depth": 3}, "bad_input", "keep_depth"),
        (Broken, {"init_image": IMAGE}, "nan", "not finite"),
        (TinyModel, {"depth": NAN.getvalue()}, "bad_image", "depth: 1 of its 4 numbers"),
        (TinyModel, {"depth": INFINITE.getvalue()}, "bad_image", "depth: 1 of its 4 numbers"),
        (TinyModel, {"depth": b"no picture"}, "bad_image", "depth: not an image file"),
    ],
)
def test_bad_rows_say_what_is_wrong(model: type[TinyModel], inputs: dict, status: str, message: str) -> None:
    row = example_request(task="depth", inputs=inputs, height=24, width=32)
    with pytest.raises(RowError, match=message) as caught:
        DepthTask()(row, model(extra_channels=1), torch.Generator())
    assert caught.value.status == status


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-8, 3e38])
def test_flat_maps_are_far_everywhere(value: float) -> None:
    assert depth_channel(np.full((16, 16), value, np.float32), (4, 4)).unique().tolist() == [-1]


def test_a_map_is_normalised_at_latent_size() -> None:
    ramp = depth_channel(np.linspace(3, 900, 64, dtype=np.float32).reshape(8, 8), (8, 8))
    assert ramp.min() == -1 and ramp.max() == 1
