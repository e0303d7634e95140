"""LDM's single files, against the networks that they were made of, and diffusers' own converter."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from batchsd.model.checkpoint import load
from batchsd.model.config import unet_config
from batchsd.model.ldm_names import unet_state
from batchsd.model.shapes import unet_dict
from batchsd.model.unet import UNet
from batchsd.types import UsageError
from tests.model.ldm import Networks, networks, to_ldm, unet_to_ldm, vae_to_ldm
from tests.model.whole import SD1, SD2, SDXL

CASES = {"SD1 text": 4, "SD1 inpaint": 9, "SD2 text": 4, "SD2 depth": 5, "SDXL text": 4}
TEXTS = ["a photo of a cat", ""]


@cache
def theirs(case: str) -> Networks:
    return networks(case.split()[0], CASES[case])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def single(folder: Path, case: str) -> Path:
    path = folder / f"{case}.safetensors"
    if not path.exists():
        save_file(to_ldm(theirs(case)), path)
    return path


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def ids(pad: int) -> Tensor:
    """CLIP's known numbers of "a photo of a cat", and of the empty text."""
    cat, none = [49406, 320, 1125, 539, 320, 2368, 49407], [49406, 49407]
    return torch.tensor([cat + [pad] * 70, none + [pad] * 75])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_the_networks_that_it_was_made_of(folder: Path, case: str) -> None:
    model, made = load(single(folder, case)), theirs(case)
    assert model.reasons[0].startswith(f"{case} ({CASES[case]}-channel U-Net, cross-attention ")
    assert model.extra_channels == CASES[case] - 4

    states, pooled = model.encode_prompts(TEXTS)
    if made.family == "SDXL":
        first = made.texts[0](ids(49407), output_hidden_states=True)
        second = made.texts[1](ids(0), output_hidden_states=True)
        expected = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        assert pooled is not None and difference(pooled, second.text_embeds) < 1e-5
        added = {"text_embeds": pooled, "time_ids": model.time_ids(16, 24)[None].repeat(2, 1)}
        assert added["time_ids"][0].tolist() == [16, 24, 0, 0, 16, 24]
    else:
        expected = made.texts[0](ids(0 if made.family == "SD2" else 49407)).last_hidden_state
        added = None
        assert pooled is None
    assert difference(states, expected) < 1e-5
    assert torch.equal(model.encode_text(TEXTS), states)

    latents, timesteps = torch.randn(2, CASES[case], 8, 12), torch.tensor([3, 801])
    out = made.unet(latents, timesteps, expected, added_cond_kwargs=added).sample
    assert difference(model.unet(latents, timesteps, states, added=added), out) < 1e-4

    z = torch.randn(1, 4, 8, 8)
    decoded = made.vae.decode(z / model.vae.config.scaling_factor).sample / 2 + 0.5
    assert difference(model.decode(z), decoded.clamp(0, 1)) < 1e-5
    assert model.vae.config.scaling_factor == (0.13025 if made.family == "SDXL" else 0.18215)


@pytest.mark.parametrize("case", ["SD1 inpaint", "SD2 depth", "SDXL text"])
def test_diffusers_takes_the_file_too(folder: Path, case: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    state, made = load_file(single(folder, case)), theirs(case)
    unet = convert_ldm_unet_checkpoint(dict(state), config=dict(made.unet.config))
    expected = made.unet.state_dict()
    assert unet.keys() == expected.keys() and all(torch.equal(unet[name], expected[name]) for name in unet)
    vae = convert_ldm_vae_checkpoint(dict(state), config=dict(made.vae.config))
    assert vae.keys() == made.vae.state_dict().keys()


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SD1, 859_520_964), ({**SD1, "in_channels": 9}, 859_535_364), ({**SD2, "in_channels": 5}, 865_913_604),
        (SDXL, 2_567_463_684),
    ],
)  # fmt: skip
def test_configs_of_the_real_sizes_are_read_from_the_shapes(config: dict, parameters: int) -> None:
    with torch.device("meta"):
        unet = UNet(unet_config(config))
    state = unet.state_dict()
    assert sum(value.numel() for value in state.values()) == parameters
    back = unet_state(unet_to_ldm(state))
    assert back.keys() == state.keys()
    found = unet_dict(back) | {key: config[key] for key in ("attention_head_dim", "sample_size") if key in config}
    assert unet_config(found) == unet_config(config)


def test_ckpt_nested_with_a_trainers_leavings_and_an_average(folder: Path, tmp_path: Path) -> None:
    state = to_ldm(theirs("SD1 text"))
    prefix = "model.diffusion_model."
    names = [name for name in state if name.startswith(prefix)]
    average = {"model_ema." + n.removeprefix("model.").replace(".", ""): state[n] + 1 for n in names}
    torch.save({"state_dict": {**state, **average}, "global_step": 7}, tmp_path / "a.ckpt")
    plain, averaged = load(tmp_path / "a.ckpt"), load(tmp_path / "a.ckpt", ema=True)
    assert any(f"{len(names)} tensors of an averaged U-Net" in reason for reason in plain.reasons)
    assert torch.equal(plain.unet.conv_in.weight + 1, averaged.unet.conv_in.weight)
    with pytest.raises(UsageError, match="no averaged U-Net"):
        load(single(folder, "SD1 text"), ema=True)


def test_velocity_is_told_by_one_tensors_deviation(tmp_path: Path) -> None:
    state = to_ldm(theirs("SD2 text"))
    state["model.diffusion_model.output_blocks.5.1.transformer_blocks.0.norm1.bias"] = torch.linspace(-0.3, 0.3, 64)
    save_file(state, tmp_path / "v.safetensors")
    model = load(tmp_path / "v.safetensors")
    assert model.scheduler_config["prediction_type"] == "v_prediction"
    assert "deviates by 0.176, above 0.09" in model.reasons[1]
    assert model.native_size == 96 * model.scale_factor
    save_file(state, tmp_path / "e.safetensors", {"modelspec.prediction_type": "epsilon"})
    assert load(tmp_path / "e.safetensors").scheduler_config["prediction_type"] == "epsilon"


def test_schedulers_of_the_families(folder: Path) -> None:
    classes = {case: load(single(folder, case)).scheduler_config["_class_name"] for case in CASES}
    assert classes == {
        "SD1 text": "PNDMScheduler", "SD1 inpaint": "DDIMScheduler", "SD2 text": "PNDMScheduler",
        "SD2 depth": "PNDMScheduler", "SDXL text": "EulerDiscreteScheduler",
    }  # fmt: skip


def test_sdxl_zeros_for_a_negative_that_is_not_given(folder: Path) -> None:
    model = load(single(folder, "SDXL text"))
    states, pooled = model.encode_prompts([None, "a cat"])
    assert model.zero_negative and pooled is not None
    assert not states[0].any() and not pooled[0].any()
    assert torch.equal(states[1], model.encode_text(["a cat"])[0])


def test_a_vae_of_its_own(folder: Path, tmp_path: Path) -> None:
    other = networks("SD1", seed=5).vae
    save_file({n: v.contiguous() for n, v in vae_to_ldm(other.state_dict()).items()}, tmp_path / "v.safetensors")
    other.save_pretrained(tmp_path / "v")
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = (other.decode(z / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    for vae in ("v.safetensors", "v"):
        model = load(single(folder, "SD1 text"), vae=str(tmp_path / vae))
        assert difference(model.decode(z), expected) < 1e-5
    with pytest.raises(UsageError, match="model.vae: .*: no autoencoder in it"):
        save_file({"a": z}, tmp_path / "none.safetensors")
        load(single(folder, "SD1 text"), vae=str(tmp_path / "none.safetensors"))


REFUSED = {
    "control_model.zero_convs.0.weight": "this is a ControlNet",
    "double_blocks.0.img_attn.weight": "this is a Flux network",
    "lora_unet_mid.lora_up.weight": "this is a LoRA",
    "conditioner.embedders.0.model.ln_final.weight": "this is the SDXL refiner",
    "conv_in.weight": "model.path is the folder above it",
    "encoder.conv_in.weight": "give it as model.vae",
    "bert.weight": "no tensor begins with 'model.diffusion_model.'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_named(tmp_path: Path, name: str) -> None:
    save_file({name: torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError) as error:
        load(tmp_path / "a.safetensors")
    assert REFUSED[name] in str(error.value) and "\n" not in str(error.value)


def test_without_a_part(tmp_path: Path) -> None:
    state = to_ldm(theirs("SD2 text"))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({n: v for n, v in state.items() if n != first}, tmp_path / "cut.safetensors")
    with pytest.raises(UsageError, match="cut.safetensors: tensor 'conv_in.weight' is missing"):
        load(tmp_path / "cut.safetensors")
    save_file({n: v for n, v in state.items() if not n.startswith("first_stage")}, tmp_path / "no_vae.safetensors")
    with pytest.raises(UsageError, match="holds no autoencoder; name one as model.vae"):
        load(tmp_path / "no_vae.safetensors")
    save_file({n: v for n, v in state.items() if not n.startswith("cond")}, tmp_path / "no_text.safetensors")
    with pytest.raises(UsageError, match="cross-attention of width 128; known are"):
        load(tmp_path / "no_text.safetensors")
