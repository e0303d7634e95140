"""LoRAs in the field's spellings against the sum that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from batchsd.model.checkpoint import load
from batchsd.model.extras import split_weight
from batchsd.types import UsageError

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"


def factors(out: int, inside: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    """(down, up)."""
    torch.manual_seed(out + inside)
    return torch.randn(rank, inside), torch.randn(out, rank)


def merged(checkpoint: Path, tmp_path: Path, state: dict[str, Tensor], weight: str = "") -> tuple:
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "l.safetensors")
    before = load(checkpoint)
    after = load(checkpoint, loras=[f"{tmp_path / 'l.safetensors'}{weight}"])
    return before, after


def spelled(kind: str, layer: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    flat = layer.replace(".", "_")
    ldm = flat.replace("down_blocks_0_attentions_0", "input_blocks_1_1")
    return {
        "kohya": {f"lora_unet_{flat}.lora_down.weight": down, f"lora_unet_{flat}.lora_up.weight": up},
        "kohya, LDM's blocks": {f"lora_unet_{ldm}.lora_down.weight": down, f"lora_unet_{ldm}.lora_up.weight": up},
        "peft": {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up},
        "peft alone": {f"base_model.model.{layer}.lora_A.weight": down, f"base_model.model.{layer}.lora_B.weight": up},
        "diffusers": {f"unet.{layer}.lora.down.weight": down, f"unet.{layer}.lora.up.weight": up},
        "diffusers' processors": {
            f"{layer.replace('.to_q', '.processor.to_q_lora')}.{part}.weight": value
            for part, value in (("down", down), ("up", up))
        },
    }[kind]  # fmt: skip


SPELLINGS = ["kohya", "kohya, LDM's blocks", "peft", "peft alone", "diffusers", "diffusers' processors"]


@pytest.mark.parametrize("kind", SPELLINGS)
def test_every_spelling_adds_up_times_down(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    down, up = factors(32, 32)
    before, after = merged(checkpoint, tmp_path, spelled(kind, QUERY, down, up), ":0.5")
    old, new = (model.unet.get_submodule(QUERY).weight for model in (before, after))
    assert torch.allclose(new, old + 0.5 * up @ down, atol=1e-6)
    same = f"{QUERY[:-1]}k.weight"
    assert torch.equal(before.unet.state_dict()[same], after.unet.state_dict()[same])


def test_alpha_convolutions_and_the_text_encoder(checkpoint: Path, tmp_path: Path) -> None:
    down, up = factors(32, 32 * 9)
    text_down, text_up = factors(32, 32)
    conv, text = "lora_unet_" + CONV.replace(".", "_"), "lora_te_text_model_" + TEXT.replace(".", "_")
    before, after = merged(checkpoint, tmp_path, {
        f"{conv}.lora_down.weight": down.view(3, 32, 3, 3), f"{conv}.lora_up.weight": up.view(32, 3, 1, 1),
        f"{conv}.alpha": torch.tensor(1.5), f"{text}.lora_down.weight": text_down, f"{text}.lora_up.weight": text_up,
    })  # fmt: skip
    old, new = (model.unet.get_submodule(CONV).weight for model in (before, after))
    assert torch.allclose(new, old + 1.5 / 3 * (up @ down).view(32, 32, 3, 3), atol=1e-5)
    assert new.is_contiguous(memory_format=torch.channels_last)
    old, new = (model.text.model.get_submodule(TEXT).weight for model in (before, after))
    assert torch.allclose(new, old + text_up @ text_down, atol=1e-5)


def test_several_add_up(checkpoint: Path, tmp_path: Path) -> None:
    down, up = factors(32, 32)
    file = tmp_path / "l.safetensors"
    save_file(spelled("peft", QUERY, down, up), file)
    twice, once = load(checkpoint, loras=[f"{file}:0.3", f"{file}:0.7"]), load(checkpoint, loras=[str(file)])
    found, expected = (model.unet.get_submodule(QUERY).weight for model in (twice, once))
    assert torch.allclose(found, expected, atol=1e-6)


def test_weights_behind_a_colon() -> None:
    assert split_weight("/a/b.safetensors:0.8") == (Path("/a/b.safetensors"), 0.8)
    assert split_weight("/a/b.safetensors") == (Path("/a/b.safetensors"), 1.0)
    assert split_weight("/a:b/c.safetensors") == (Path("/a:b/c.safetensors"), 1.0)


CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
REFUSED = {
    "another family": (spelled("peft", CROSS, *factors(32, 2048)), "made for SDXL (cross-attention 2048), this"),
    "another shape": (
        spelled("peft", QUERY, *factors(32, 48)), "changes a weight of [32, 32] by [32, 3] times [3, 48]"),
    "other layers": (
        spelled("peft", "up_blocks.7.conv", *factors(4, 4)), "1 of its 1 layers are not in this checkpoint"),
    "half": ({f"unet.{QUERY}.lora_A.weight": torch.zeros(3, 32)}, "is incomplete"),
    "no LoRA": ({"conv_in.weight": torch.zeros(2)}, "'conv_in.weight' is no LoRA's tensor"),
    "LoHa": ({"lora_unet_a.hada_w1_a": torch.zeros(2)}, "LoHa is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_one_clear_line(checkpoint: Path, tmp_path: Path, name: str) -> None:
    state, message = REFUSED[name]
    with pytest.raises(UsageError) as error:
        merged(checkpoint, tmp_path, state)
    assert message in str(error.value) and "l.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="model.loras: no file nowhere.safetensors"):
        load(checkpoint, loras=["nowhere.safetensors:0.5"])
