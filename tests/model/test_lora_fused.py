"""Merging against diffusers' own: load_lora_weights and fuse_lora (which peft does), U-Net and both text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from batchsd.model.checkpoint import load
from tests.tasks.xl import write_xl

UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (32, 32),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": (32, 32),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (512, 64),
    "down_blocks.0.attentions.0.proj_in": (32, 32, 1, 1),
    "up_blocks.1.resnets.0.conv1": (32, 96, 3, 3),
}
XL_UNET = {"down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": (128, 192)}


def text_layers(width: int, attention: bool = True) -> dict[str, tuple[int, ...]]:
    """Without attention for kohya's spelling: there this diffusers loses it with this transformers, and says so."""
    found = {
        "text_model.encoder.layers.1.mlp.fc1": (2 * width, width),
        "text_model.encoder.layers.0.mlp.fc2": (width, 2 * width),
    }
    return found | ({"text_model.encoder.layers.0.self_attn.q_proj": (width, width)} if attention else {})


def factors(shape: tuple[int, ...], rank: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(down, up); of a convolution down has its kernel, up is 1x1."""
    down = torch.randn(rank, *shape[1:], generator=draw)
    return down, torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=draw)


def kohya(parts: dict[str, dict[str, tuple[int, ...]]], alpha: float) -> dict[str, Tensor]:
    draw, found = torch.Generator().manual_seed(3), {}
    for prefix, layers in parts.items():
        for name, shape in layers.items():
            down, up = factors(shape, 4, draw)
            flat = f"{prefix}_{name.replace('.', '_')}"
            found |= {
                f"{flat}.lora_down.weight": down,
                f"{flat}.lora_up.weight": up,
                f"{flat}.alpha": torch.tensor(alpha),
            }
    return found


def peft(parts: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    draw, found = torch.Generator().manual_seed(4), {}
    for prefix, layers in parts.items():
        for name, shape in layers.items():
            down, up = factors(shape, 4, draw)
            found |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    return found


def fused(pipe: Any, files: list[tuple[Path, float]]) -> Any:
    for file, weight in files:
        pipe.load_lora_weights(str(file))
        pipe.fuse_lora(components=list(pipe._lora_loadable_modules), lora_scale=weight)
        pipe.unload_lora_weights()
    return pipe


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module, plain: torch.nn.Module, changed: int) -> None:
    """Names differ by a prefix in text encoders; `changed` tensors are other than before."""
    expected = {name.removeprefix("text_model."): value for name, value in theirs.state_dict().items()}
    found = {name.removeprefix("text_model."): value for name, value in ours.state_dict().items()}
    before = {name.removeprefix("text_model."): value for name, value in plain.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.allclose(value, expected[name], atol=1e-5, rtol=1e-5), name
    assert sum(not torch.equal(value, before[name]) for name, value in found.items()) == changed


def test_sd1_several_in_both_spellings(checkpoint: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(kohya({"lora_unet": UNET, "lora_te": text_layers(32, False)}, alpha=2.0), one)
    save_file(peft({"unet": UNET, "text_encoder": text_layers(32)}), two)
    pipe = fused(StableDiffusionPipeline.from_pretrained(checkpoint), [(one, 0.7), (two, -0.5)])
    model, plain = load(checkpoint, loras=[f"{one}:0.7", f"{two}:-0.5"]), load(checkpoint)
    same_weights(model.unet, pipe.unet, plain.unet, len(UNET))
    same_weights(model.text.model, pipe.text_encoder, plain.text.model, 3)


@pytest.mark.parametrize("spelling", ["kohya", "peft"])
def test_sdxl_with_both_text_encoders(tmp_path: Path, spelling: str) -> None:
    from diffusers import StableDiffusionXLPipeline

    folder, file = write_xl(tmp_path / "xl"), tmp_path / "l.safetensors"
    first, second = (text_layers(width, spelling == "peft") for width in (64, 128))
    if spelling == "kohya":
        save_file(kohya({"lora_unet": XL_UNET, "lora_te1": first, "lora_te2": second}, alpha=1.0), file)
    else:
        save_file(peft({"unet": XL_UNET, "text_encoder": first, "text_encoder_2": second}), file)
    pipe = fused(StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False), [(file, 0.8)])
    model, plain = load(folder, loras=[f"{file}:0.8"]), load(folder)
    assert model.text_2 is not None and plain.text_2 is not None
    same_weights(model.unet, pipe.unet, plain.unet, 1)
    same_weights(model.text.model, pipe.text_encoder, plain.text.model, len(first))
    same_weights(model.text_2.model, pipe.text_encoder_2, plain.text_2.model, len(second))
