"""Folders in diffusers' layout as people have them: variants, shards, pickles, missing parts, SDXL's two encoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchsd.model.checkpoint import load
from batchsd.model.folder import NETWORK, TEXT, network_state
from batchsd.types import UsageError
from tests.model.ldm import networks

UNET = "unet/diffusion_pytorch_model"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def as_variant(folder: Path) -> None:
    (folder / f"{UNET}.safetensors").rename(folder / f"{UNET}.fp16.safetensors")
    (folder / f"{UNET}.non_ema.safetensors").write_bytes(b"never read")


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / f"{UNET}.safetensors"), folder / f"{UNET}.bin")
    (folder / f"{UNET}.safetensors").unlink()


def as_shards(folder: Path, variant: str = "") -> None:
    state, weights = load_file(folder / f"{UNET}.safetensors"), {}
    for i, names in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        file = f"diffusion_pytorch_model{variant}-{i + 1:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, folder / "unet" / file)
        weights |= dict.fromkeys(names, file)
    index = folder / f"{UNET}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    (folder / f"{UNET}.safetensors").unlink()


@pytest.mark.parametrize(
    "change",
    [as_variant, as_pickle, as_shards, lambda folder: as_shards(folder, ".fp16")],
    ids=["variant", "pickle", "shards", "shards of a variant"],
)
def test_the_same_weights_in_other_files(checkpoint: Path, copy: Path, change: Callable[[Path], None]) -> None:
    change(copy)
    found, expected = network_state(copy / "unet", NETWORK), network_state(checkpoint / "unet", NETWORK)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_transformers_pickle(checkpoint: Path, copy: Path) -> None:
    state = load_file(copy / "text_encoder/model.safetensors")
    torch.save(state, copy / "text_encoder/pytorch_model.bin")
    (copy / "text_encoder/model.safetensors").unlink()
    assert network_state(copy / "text_encoder", TEXT).keys() == state.keys()


def test_a_missing_shard(copy: Path) -> None:
    as_shards(copy)
    (copy / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="00002-of-00002.safetensors: missing"):
        load(copy)
    (copy / f"{UNET}.safetensors.index.json").write_text("[]")
    with pytest.raises(UsageError, match="not an index of shards"):
        load(copy)


def test_without_model_index_and_scheduler(checkpoint: Path, copy: Path) -> None:
    (copy / "model_index.json").unlink()
    shutil.rmtree(copy / "scheduler")
    model = load(copy)
    assert model.scheduler_config["_class_name"] == "PNDMScheduler"
    assert "the folder has none" in model.reasons[-1]
    assert torch.equal(model.encode_text(["a cube"]), load(checkpoint).encode_text(["a cube"]))


@torch.no_grad()
def test_sdxl_as_diffusers_writes_it(tmp_path: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    made = networks("SDXL")
    parts = {"unet": made.unet, "vae": made.vae, "text_encoder": made.texts[0], "text_encoder_2": made.texts[1]}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    EulerDiscreteScheduler(timestep_spacing="leading").save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text('{"force_zeros_for_empty_prompt": true}')
    model = load(tmp_path)  # no tokenizers either: CLIP's own vocabulary
    assert model.text_2 is not None and model.zero_negative and model.takes_sizes
    assert [text.tokenizer.pad_token_id for text in (model.text, model.text_2)] == [49407, 0]
    states, pooled = model.encode_prompts(["a cat"])
    first = made.texts[0](model.text.ids(["a cat"]), output_hidden_states=True).hidden_states
    second = made.texts[1](model.text_2.ids(["a cat"]), output_hidden_states=True)
    assert torch.allclose(states, torch.cat([first[-2], second.hidden_states[-2]], dim=-1), atol=1e-5)
    assert pooled is not None and torch.allclose(pooled, second.text_embeds, atol=1e-5)
    skipped = load(tmp_path, clip_skip=1).encode_text(["a cat"])
    assert torch.allclose(skipped, torch.cat([first[-3], second.hidden_states[-3]], dim=-1), atol=1e-5)


def test_clip_skip_equals_diffusers(checkpoint: Path) -> None:
    # The arithmetic of StableDiffusionPipeline.encode_prompt, which cannot run it with this transformers.
    from transformers import CLIPTextModel

    theirs = CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
    model = load(checkpoint, clip_skip=1)
    with torch.no_grad():
        hidden = theirs(model.text.ids(["a red cube"]), output_hidden_states=True).hidden_states
        expected = theirs.final_layer_norm(hidden[-2])
    assert torch.allclose(model.encode_text(["a red cube"]), expected, atol=1e-5)
    assert not torch.allclose(load(checkpoint).encode_text(["a red cube"]), expected, atol=1e-2)
    with pytest.raises(UsageError, match="model.clip_skip: .* has only 2 layers"):
        load(checkpoint, clip_skip=2)


@pytest.mark.parametrize(("upcast", "dtype", "vae"), [(True, "float16", "float32"), (False, "float16", "float16"),
                                                     (True, "bfloat16", "bfloat16")])  # fmt: skip
def test_a_vae_that_overflows_half_types_is_loaded_in_float32(copy: Path, upcast: bool, dtype: str, vae: str) -> None:
    """SDXL's force_upcast: bfloat16 has float32's range and needs it not."""
    config = json.loads((copy / "vae/config.json").read_text())
    (copy / "vae/config.json").write_text(json.dumps({**config, "force_upcast": upcast}))
    model = load(copy, dtype=dtype)
    assert (model.unet.dtype, model.vae.dtype) == (getattr(torch, dtype), getattr(torch, vae))


def test_a_half_type_vae_that_overflows_is_asked_again_in_float32(checkpoint: Path) -> None:
    expected, model = load(checkpoint), load(checkpoint, dtype="bfloat16")
    latents = torch.randn(1, 4, 8, 8)
    asked, real = [], model.vae.decode

    def overflowing(z: torch.Tensor) -> torch.Tensor:
        asked.append(z.dtype)
        return real(z) * (float("nan") if z.dtype != torch.float32 else 1)

    model.vae.decode = overflowing  # type: ignore[method-assign]
    pictures = model.decode(latents)
    assert asked == [torch.bfloat16, torch.float32]
    assert torch.allclose(pictures, expected.decode(latents), atol=2e-2)  # the weights were rounded once
    model.decode(latents)
    assert asked[2:] == [torch.float32]
