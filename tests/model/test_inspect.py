"""`inspect` says what a checkpoint is without loading it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from batchsd.cli import commands
from batchsd.model.hub import cached_model
from batchsd.model.inspect import describe, inspect_checkpoint
from tests.model.ldm import networks, to_ldm


def test_a_single_file(tmp_path: Path) -> None:
    made = networks("SD2", 5)
    depth = {"depth_model.model.scratch.output_conv.4.bias": torch.zeros(1), "depth_model.model.b": torch.zeros(6)}
    save_file({**to_ldm(made), **depth}, tmp_path / "d.safetensors")
    facts = inspect_checkpoint(tmp_path / "d.safetensors")
    assert facts["family"] == "SD2 depth" and facts["scheduler"] == "PNDMScheduler" and facts["extra_channels"] == 1
    assert facts["networks"]["unet"]["parameters"] == sum(p.numel() for p in made.unet.parameters())
    lines = describe(facts)
    assert "because conv_in is [64, 5, 3, 3] and the text encoder lies under 'cond_stage_model.model.'" in lines[0]
    assert "2 tensors of a depth network (depth_model.), for rows that bring no depth map" in lines
    assert facts["networks"]["depth_estimator"]["parameters"] == 7 and lines[-1] == "nothing missing, nothing unused"
    assert not any(network["problems"] for network in facts["networks"].values())


def test_a_file_without_an_autoencoder(tmp_path: Path) -> None:
    state = {n: v for n, v in to_ldm(networks("SD1")).items() if not n.startswith("first_stage_model.")}
    save_file(state, tmp_path / "pruned.safetensors")
    done = CliRunner().invoke(commands, ["inspect", str(tmp_path / "pruned.safetensors")])
    assert done.exit_code == 2 and "vae: none in it; name one as model.vae\n" in done.output
    assert "native size 512 x 512 pixels" in done.output and done.output.endswith("not drawable as it is\n")


def test_the_command_names_what_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["quant_conv.bias"]
    save_file(state, file)
    good, bad = (CliRunner().invoke(commands, ["inspect", str(path)]) for path in (checkpoint, folder))
    assert good.exit_code == 0 and "prediction type epsilon because scheduler_config.json says so" in good.output
    assert bad.exit_code == 2 and "vae: 1 tensor missing, first 'quant_conv.bias'" in bad.output
    told = CliRunner().invoke(commands, ["inspect", "--json", str(checkpoint)])
    assert json.loads(told.output)["networks"]["text_encoder"]["dtypes"] == ["float32"]


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_a_hub_name_is_looked_up_in_the_cache(tmp_path: Path, variable: str) -> None:
    cache = tmp_path if variable == "HF_HUB_CACHE" else tmp_path / "hub"
    folder = cache / "models--org--name"
    for commit in ("aaa", "bbb"):
        (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("aaa\n")
    environ = {variable: str(tmp_path)}
    assert cached_model("org/name", environ) == folder / "snapshots/aaa"
    assert cached_model("org/other", environ) is None
