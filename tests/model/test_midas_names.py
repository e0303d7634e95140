"""MiDaS' names against transformers' DPT of the published config, and SD2-depth's file with it inside."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from batchsd.model.checkpoint import load, read_parts
from batchsd.model.midas_names import CONFIG, depth_state
from tests.model.ldm import dpt_to_midas, networks, to_ldm


def numbered() -> dict[str, Tensor]:
    """Every tensor of the whole network as one number of its own."""
    from transformers import DPTConfig, DPTForDepthEstimation

    with torch.device("meta"):
        names = DPTForDepthEstimation(DPTConfig.from_dict(dict(CONFIG))).state_dict()
    return {name: torch.tensor([float(i)]) for i, name in enumerate(names)}


def test_every_tensor_finds_its_place() -> None:
    expected = numbered()
    midas = dpt_to_midas(expected)
    # 308 of timm's vit_base_resnet50_384 and 60 of MiDaS' own: what a whole-size network of theirs has.
    assert len(midas) == 368 and len(expected) == 414
    assert "pretrained.model.patch_embed.backbone.stages.2.blocks.8.norm3.bias" in midas
    assert (
        "pretrained.act_postprocess3.0.project.0.bias" in midas
        and "scratch.refinenet4.resConfUnit2.conv1.bias" in midas
    )
    assert depth_state(midas) == expected


def test_what_is_unknown_stays_as_it_is() -> None:
    assert depth_state({"elsewhere.weight": torch.zeros(1)}).keys() == {"elsewhere.weight"}


def test_the_file_and_the_folder_give_the_same_network(tmp_path: Path) -> None:
    made, depth = networks("SD2", in_channels=5), numbered()
    inside = {f"depth_model.model.{name}": value for name, value in dpt_to_midas(depth).items()}
    save_file({**to_ldm(made), **inside}, tmp_path / "depth.safetensors")
    found = read_parts(tmp_path / "depth.safetensors").depth
    assert found is not None and found.state == depth and found.config["is_hybrid"]
    model = load(tmp_path / "depth.safetensors")  # and the rest is what it is without it
    assert model.reasons[0].startswith("SD2 depth") and "368 tensors of a depth network" in model.reasons[-1]

    folder = tmp_path / "folder"
    for name, part in (("unet", made.unet), ("vae", made.vae), ("text_encoder", made.texts[0])):
        part.save_pretrained(folder / name)
    assert read_parts(folder).depth is None
    (folder / "depth_estimator").mkdir()
    (folder / "depth_estimator" / "config.json").write_text('{"is_hybrid": true}')
    save_file(depth, folder / "depth_estimator" / "model.safetensors")
    beside = read_parts(folder).depth
    assert beside is not None and beside.state == depth and beside.config == {"is_hybrid": True}
