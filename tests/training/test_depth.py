"""The shipped text model made into a depth model, in a few steps: what it sees, what stays, what diffusers draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import batchsd
from batchsd.images import grey16, png
from batchsd.model.checkpoint import load
from batchsd.tasks.depth import DepthTask
from batchsd.testing.tasks import TinyModel, example_request
from batchsd.training.__main__ import main
from batchsd.training.config import EstimatorStage
from batchsd.training.data import load_pictures
from batchsd.training.dataset import write_dataset
from batchsd.training.denoiser import widened
from batchsd.training.depth import NEARNESS, load_depths
from batchsd.training.depth_estimator import estimator
from batchsd.training.evaluate import draw
from batchsd.training.scenes import render, sample_reserved_scene, sample_training_scene

BASE = Path(batchsd.__file__).parent / "assets" / "tiny-scenes"
CONFIG = f"""
pictures = "scenes.parquet"
work = "work"
output = "made"
base = "{BASE}"
[scenes]
count = 6
[depth]
holds = "distance"
steps = 3
batch_size = 2
[estimator]
steps = 2
batch_size = 2
width = 16
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    (folder / "config.toml").write_text(CONFIG)
    assert main([str(folder / "config.toml")]) == 0
    return folder


def test_the_channel_is_the_one_of_a_depth_row(made: Path) -> None:
    """From the same scene: the file's distances as training reads them, its nearness as a manifest holds it."""
    write_dataset(made / "one.parquet", 1, seed=5)
    drawn = render(sample_training_scene(np.random.default_rng([5, 0])))
    row = example_request(task="depth", inputs={"depth": grey16(1 / drawn.depth)}, height=64, width=64)
    asked = DepthTask()(row, TinyModel(extra_channels=1), torch.Generator())
    (seen,) = load_depths(made / "one.parquet", (8, 8), NEARNESS["distance"])
    assert asked.branches[0].channels_CHW is not None
    # the file rounds distances of 10 to 14 units to thousandths
    assert (seen - asked.branches[0].channels_CHW).abs().max() < 2e-3
    assert seen[0, -1].mean() > seen[0, 0].mean(), "the floor before us is nearer than the wall"


def test_a_new_channel_of_weight_zero_changes_nothing() -> None:
    base = load(BASE)
    noisy, depth = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 8, 8)
    t, context = torch.tensor([10, 900]), base.encode_text(["a red cube", ""])
    with torch.no_grad():
        before = base.unet(noisy, t, context)
        after = widened(base.unet, 1)(torch.cat([noisy, depth], 1), t, context)
    assert torch.allclose(before, after, atol=1e-5)


def test_only_the_unet_learns(made: Path) -> None:
    for file in BASE.rglob("*"):
        part = file.relative_to(BASE)
        if file.is_file() and part.parts[0] not in ("unet", "model_index.json"):
            assert (made / "made" / part).read_bytes() == file.read_bytes(), part
    tuned = load(made / "made")
    assert tuned.extra_channels == 1 and tuned.unet.conv_in.weight[:, 4].abs().max() > 0


def test_draws_the_same_in_diffusers(made: Path) -> None:
    """The folder as it is, with a map and with one that its own network estimates."""
    from diffusers import StableDiffusionDepth2ImgPipeline
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    # The class that its index names wants torchvision; this one is the same without.
    extractor = DPTImageProcessorPil.from_pretrained(made / "made" / "feature_extractor")
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(
        made / "made", torch_dtype=torch.float32, feature_extractor=extractor
    )
    pipe.set_progress_bar_config(disable=True)
    drawn, caption = render(sample_reserved_scene(np.random.default_rng(1))), "a large red sphere on the left"
    for depth in (grey16(1 / drawn.depth), None):
        map_1HW = None if depth is None else torch.from_numpy(1 / drawn.depth)[None]
        theirs = pipe(
            caption, image=Image.fromarray(drawn.image), depth_map=map_1HW, strength=0.8, num_inference_steps=6,
            guidance_scale=2.0, output_type="np", generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
        given = {"init_image": png(drawn.image), "depth": depth, "strength": 0.8}
        ours = draw(load(made / "made"), [caption], "model", 6, 2.0, DepthTask(), [given])[0]
        assert np.abs(ours - theirs * 255).max() <= 1


def test_an_estimator_learns_what_is_near(tmp_path: Path) -> None:
    """After some steps on a few scenes it knows their maps better than any constant could."""
    write_dataset(tmp_path / "scenes.parquet", 8, seed=3)
    pictures = load_pictures(tmp_path / "scenes.parquet")
    maps = load_depths(tmp_path / "scenes.parquet", (64, 64), NEARNESS["distance"])
    how = EstimatorStage(steps=40, batch_size=4, warmup=5, learning_rate=2e-3, ema=0.9, width=32, fusion=16)
    network = estimator(how, pictures, maps, tmp_path / "estimator.state", lambda line: None)
    with torch.no_grad():
        seen = network(pictures.floats(torch.arange(8))).predicted_depth
    true = (maps[:, 0] + 1) / 2
    assert seen.shape == true.shape
    assert (seen - true).square().mean() < 0.8 * (true - true.mean()).square().mean()


def test_goes_on_where_it_stopped(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(made / "config.toml")]) == 0
    said = capsys.readouterr().out
    assert "samples/s" not in said and "wrote" in said


def test_what_cannot_be_used_is_one_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(made / "scenes.parquet").drop_columns(["depth"])
    pq.write_table(table, tmp_path / "scenes.parquet")
    assert len(load_pictures(tmp_path / "scenes.parquet")) == 6
    (tmp_path / "config.toml").write_text(CONFIG)
    assert main([str(tmp_path / "config.toml")]) == 2
    assert "scenes.parquet: no column depth" in capsys.readouterr().err
    (tmp_path / "config.toml").write_text(CONFIG.replace(str(BASE), str(made / "made")))
    assert main([str(tmp_path / "config.toml")]) == 2
    assert "not a text model" in capsys.readouterr().err
    (tmp_path / "config.toml").write_text(CONFIG.replace("distance", "far"))
    assert main([str(tmp_path / "config.toml")]) == 2
    assert "config.toml: depth.holds" in capsys.readouterr().err
