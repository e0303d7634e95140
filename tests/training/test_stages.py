"""The whole training, small: from a Parquet of pictures to a folder that diffusers opens and draws alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from batchsd.model.checkpoint import load
from batchsd.model.config import VAEConfig
from batchsd.model.vae import AutoencoderKL
from batchsd.training import stages
from batchsd.training.__main__ import main
from batchsd.training.autoencoder import encode_all, normalise_latents
from batchsd.training.data import Pictures, load_pictures
from batchsd.training.dataset import write_dataset
from batchsd.training.denoiser import stratified_timesteps
from batchsd.training.evaluate import draw
from batchsd.training.text import attribute_labels, flatten
from batchsd.types import UsageError

CONFIG = """
pictures = "scenes.parquet"
work = "work"
output = "made"
[scenes]
count = 24
size = 16
[autoencoder]
channels = [8, 16]
groups = 4
steps = 12
batch_size = 4
[text]
width = 16
layers = 1
heads = 2
tokens = 32
steps = 3
batch_size = 8
[unet]
channels = [16, 32]
head_width = 8
groups = 8
steps = 4
batch_size = 4
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    (folder / "config.toml").write_text(CONFIG)
    assert main([str(folder / "config.toml")]) == 0
    return folder


def test_draws_the_same_in_diffusers(made: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(made / "made", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    caption = "a large red sphere on the left, white floor"
    theirs = pipe(
        caption, num_inference_steps=6, guidance_scale=2.0, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    ours = draw(load(made / "made"), [caption], "model", 6, 2.0)[0]
    assert ours.shape == (16, 16, 3)
    assert np.abs(ours - theirs * 255).max() <= 1


def test_finished_stages_are_not_run_again(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(made / "config.toml")]) == 0
    said = capsys.readouterr().out
    assert "samples/s" not in said and "wrote" in said


def test_normalising_latents_changes_no_picture(made: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(3, 3, 4, (8, 16), 1, groups=4)).eval()
    pictures = load_pictures(made / "scenes.parquet")
    means, stds = encode_all(vae, pictures)
    with torch.no_grad():
        before = vae.decode(means[:4])
        normalise_latents(vae, means)
        new_means, new_stds = encode_all(vae, pictures)
        after = vae.decode(new_means[:4])
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(new_means.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(new_means.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4)
    ratio = means.std(dim=(0, 2, 3))[None, :, None, None]
    assert torch.allclose(new_stds, stds / ratio, rtol=1e-3)


def test_timesteps_cover_their_range_evenly() -> None:
    t = stratified_timesteps(10, 1000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.long and [int(each) // 100 for each in t] == list(range(10))


def test_attributes_become_labels() -> None:
    scenes = [{"bodies": [{"colour": "red"}], "x": 1}, {"bodies": [{"colour": "blue"}, {"colour": "red"}], "x": 2}]
    assert flatten(scenes[0]) == {"bodies.0.colour": "red", "x": "1"}
    assert attribute_labels(scenes) == {
        "bodies.0.colour": ["blue", "red"], "bodies.1.colour": ["", "red"], "x": ["1", "2"],
    }  # fmt: skip
    # A measure is no name: with more values than words could tell, it is left out.
    assert attribute_labels([{"x": i} for i in range(100)]) == {}


def test_words_of_captions() -> None:
    assert stages.words_of(["A red cube, left", "a red cone"]) == [",", "a", "cone", "cube", "left", "red"]
    assert stages.words_of(["b a a", "a b c"], most=2) == ["a", "b"]


def test_what_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.replace("width = 16", "widht = 16"))
    assert main([str(config)]) == 2
    assert "config.toml: text." in capsys.readouterr().err
    config.write_text(CONFIG.replace("[scenes]\ncount = 24\nsize = 16\n", ""))
    assert main([str(config)]) == 2
    assert "scenes.parquet: not readable as Parquet" in capsys.readouterr().err
    assert main([]) == 2


def test_pictures_of_two_sizes_are_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    from pyarrow import concat_tables

    for size in (16, 32):
        write_dataset(tmp_path / f"{size}.parquet", 2, seed=0, size=size)
    both = concat_tables([pq.read_table(tmp_path / f"{size}.parquet") for size in (16, 32)])
    pq.write_table(both, tmp_path / "both.parquet")
    with pytest.raises(UsageError, match="several sizes"):
        load_pictures(tmp_path / "both.parquet")
    assert isinstance(load_pictures(tmp_path / "16.parquet"), Pictures)
