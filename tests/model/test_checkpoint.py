"""Loading a folder: equal to diffusers and transformers, strict both ways, and one clear line when it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchsd.model.checkpoint import choose_device, choose_dtype, load
from batchsd.model.extras import extra_files
from batchsd.model.fingerprint import checkpoint_hash
from batchsd.types import UsageError

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_text_states_equal_transformers(checkpoint: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    texts = ["a red cube, left of the green cone", "", "something else " * 20]
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(checkpoint / "text_encoder")(ids).last_hidden_state
    model = load(checkpoint)
    assert torch.allclose(model.encode_text(texts), expected, atol=1e-5)
    assert model.text.tokens_cut(texts[0]) == 0
    assert model.text.tokens_cut(texts[2]) == len(tokenizer(texts[2]).input_ids) - 32


def test_pictures_to_latents_and_back_equal_diffusers(checkpoint: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(checkpoint / "vae")
    model = load(checkpoint)
    picture = torch.rand(3, 16, 32) * 2 - 1
    latent = model.encode_image(picture, torch.Generator().manual_seed(3))
    with torch.no_grad():
        posterior = theirs.encode(picture[None]).latent_dist
        drawn = posterior.sample(torch.Generator().manual_seed(3))[0] * theirs.config.scaling_factor
        decoded = theirs.decode(latent[None] / theirs.config.scaling_factor).sample
    assert torch.allclose(latent, drawn, atol=1e-5)
    assert torch.allclose(model.decode(latent[None]), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_facts(checkpoint: Path) -> None:
    model = load(checkpoint)
    assert (model.latent_channels, model.extra_channels, model.scale_factor, model.native_size) == (4, 0, 2, 16)


def test_old_attention_names_of_the_vae(checkpoint: Path, copy: Path) -> None:
    state = load_file(copy / VAE)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for key, v in state.items()}
    assert any("proj_attn" in key for key in state)
    save_file(state, copy / VAE)
    latent = torch.randn(1, 4, 8, 8)
    assert torch.equal(load(copy).decode(latent), load(checkpoint).decode(latent))


def _edit(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / file)
        change(state)
        save_file(state, folder / file)

    return apply


def _config(file: str, **changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensor missing": (
        _edit(UNET, lambda s: s.pop("conv_in.bias")), "unet: 1 tensor missing, first 'conv_in.bias'"),
    "tensor unused": (
        _edit(UNET, lambda s: s.update(extra=torch.zeros(1))), "unet: 1 tensor unused, first 'extra'"),
    "tensor of another shape": (
        _edit(VAE, lambda s: s.update({"quant_conv.bias": torch.zeros(3)})),
        "vae: 'quant_conv.bias' has shape [3], the config asks for [8]"),
    "weights cut off": (
        lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:5000]), "is the download complete?"),
    "a text file": (lambda f: (f / UNET).write_text("<html>"), "not readable as safetensors"),
    "no weights": (lambda f: (f / UNET).unlink(), "diffusion_pytorch_model.safetensors: missing"),
    "no config": (lambda f: (f / "vae/config.json").unlink(), "vae/config.json: missing"),
    "config no JSON": (lambda f: (f / "unet/config.json").write_text("{"), "not readable as JSON"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer: missing"),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder/config.json: missing"),
    "text tensor missing": (
        _edit("text_encoder/model.safetensors", lambda s: s.pop(sorted(s)[0])), "text_encoder: 1 tensor missing"),
    "vocabulary of another model": (
        _config("text_encoder/config.json", vocab_size=100), "the tokenizer knows 549 tokens, the text encoder 100"),
    "parts of two checkpoints": (
        _config("unet/config.json", cross_attention_dim=48), "has shape [32, 32], the config asks for [32, 48]"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line(copy: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(copy)
    with pytest.raises(UsageError) as error:
        load(copy)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_names_of_types_and_devices() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(UsageError, match="model.dtype: 'int3' is unknown"):
        choose_dtype("int3", cpu)
    with pytest.raises(UsageError, match="model.device: 'gpu' is unknown"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="sees no GPU here"):
            choose_device("cuda")


def test_fingerprint_is_of_the_content(checkpoint: Path, copy: Path) -> None:
    assert checkpoint_hash(copy) == checkpoint_hash(checkpoint)
    (copy / "notes.md").write_text("kept beside it")
    assert checkpoint_hash(copy) == checkpoint_hash(checkpoint)
    _edit(UNET, lambda s: s.update({"conv_in.bias": s["conv_in.bias"] + 1e-3}))(copy)
    assert checkpoint_hash(copy) != checkpoint_hash(checkpoint)
    with pytest.raises(UsageError, match="does not exist"):
        checkpoint_hash(copy / "nowhere")


def test_fingerprint_counts_what_the_job_adds(checkpoint: Path, copy: Path) -> None:
    lora = copy / UNET  # any file will do
    plain = checkpoint_hash(checkpoint)
    weak, strong = (checkpoint_hash(checkpoint, extra_files("", [f"{lora}:{w}"], [], "")) for w in (0.5, 1))
    assert len({plain, weak, strong}) == 3
    assert checkpoint_hash(checkpoint, [("vae", lora)]) != checkpoint_hash(checkpoint, [("vae", copy / "vae")])
    with pytest.raises(UsageError, match="lora 0.5: .*nowhere does not exist"):
        checkpoint_hash(checkpoint, extra_files("", [f"{copy}/nowhere:0.5"], [], ""))


def test_fingerprint_of_a_big_file_reads_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchsd.model import fingerprint

    monkeypatch.setattr(fingerprint, "_BLOCK", 16)
    monkeypatch.setattr(fingerprint, "_BLOCKS", 4)
    file = tmp_path / "big.safetensors"
    content = bytearray(range(256)) * 4
    file.write_bytes(content)
    before = checkpoint_hash(file)
    content[-1] ^= 1  # the last block is always read
    file.write_bytes(content)
    assert checkpoint_hash(file) != before
