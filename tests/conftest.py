"""Checkpoints that tests share: randomly initialised, small, written by diffusers and transformers themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

WORDS = ["a", "an", "red", "blue", "green", "cube", "sphere", "cone", ",", "left", "right", "floor", "of", "the"]


def write_checkpoint(folder: Path, **unet: object) -> Path:
    """A whole Stable Diffusion pipeline with random weights; `unet` overrides its U-Net's config."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from batchsd.training.tokenizer import write_tokenizer

    torch.manual_seed(0)
    write_tokenizer(folder / "words", WORDS)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    shape: dict = {
        "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 4,
        "cross_attention_dim": 32, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **unet,
    }  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=UNet2DConditionModel(**shape),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SD1-like checkpoint: text only, epsilon, 16x16 pixels natively."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


pytest_plugins = ["s3"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with `jobs/` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    return tmp_path
