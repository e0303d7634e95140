"""The text task against diffusers' own latents, and its rules for guidance and sizes."""

from dataclasses import dataclass, replace

import pyarrow as pa
import pytest
import torch

from batchsd.tasks.text import TextTask
from batchsd.types import Request, RowError


@dataclass
class Model:
    """A stand-in for an SD 1.5 sized checkpoint."""

    latent_channels: int = 4
    extra_channels: int = 0
    scale_factor: int = 8
    native_size: int = 512
    zero_negative: bool = False
    takes_sizes: bool = False
    guidance_dim: int = 0

    def encode_image(self, image_3HW, generator):
        raise AssertionError("the text task has no image")


REQUEST = Request(
    key="a", index=0, repeat_index=0, prompt="a cat", negative_prompt=None, seed=7, steps=20,
    guidance_scale=5.0, height=64, width=96, scheduler="euler", task="text", inputs={}, columns=pa.table({}),
)  # fmt: skip


def condition(request, model=None, seed=7):
    return TextTask()(request, model or Model(), torch.Generator().manual_seed(seed))


def test_noise_is_what_stable_diffusion_pipeline_draws():
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.__new__(StableDiffusionPipeline)  # only its prepare_latents is asked
    pipeline.vae_scale_factor, pipeline.scheduler = 8, DDIMScheduler()  # DDIM's init_noise_sigma is 1
    theirs = pipeline.prepare_latents(
        1, 4, 64, 96, torch.float32, torch.device("cpu"), [torch.Generator().manual_seed(7)]
    )
    ours = condition(REQUEST).noise_CHW
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs[0])


def test_one_draw_only():
    ours, plain = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    TextTask()(REQUEST, Model(), ours)
    torch.randn((1, 4, 8, 12), generator=plain)
    assert torch.equal(ours.get_state(), plain.get_state())


def test_guidance_is_negative_first():
    found = condition(replace(REQUEST, negative_prompt="blurry", guidance_scale=7.5))
    assert [b.prompt for b in found.branches] == ["blurry", "a cat"]
    # Ho and Salimans: negative + g * (prompt - negative), here on two numbers
    negative, prompt = 0.3, -1.7
    guided = sum(w * p for w, p in zip(found.weights(1.0), (negative, prompt), strict=True))
    assert guided == pytest.approx(negative + 7.5 * (prompt - negative))


def test_negative_not_given_is_the_empty_text_or_zeros_where_the_checkpoint_wants_them():
    assert condition(REQUEST).branches[0].prompt == ""
    assert condition(REQUEST, Model(zero_negative=True)).branches[0].prompt is None
    assert condition(replace(REQUEST, negative_prompt=""), Model(zero_negative=True)).branches[0].prompt == ""


@pytest.mark.parametrize("guidance", [1.0, 0.0, 0.5])
def test_without_guidance_one_branch(guidance):
    found = condition(replace(REQUEST, negative_prompt="blurry", guidance_scale=guidance))
    assert [b.prompt for b in found.branches] == ["a cat"]
    assert tuple(found.weights(14.6)) == (1.0,)


def test_native_size_where_none_is_given():
    assert condition(replace(REQUEST, height=None)).noise_CHW.shape == (4, 64, 12)
    assert condition(replace(REQUEST, width=None)).noise_CHW.shape == (4, 8, 64)


@pytest.mark.parametrize(
    "height, width, words", [(60, 64, "height 60"), (64, 0, "width 0"), (-8, 64, "height -8")]
)
def test_wrong_size_is_bad_input(height, width, words):
    with pytest.raises(RowError, match=words) as error:
        condition(replace(REQUEST, height=height, width=width))
    assert error.value.status == "bad_input"


def test_checkpoint_with_extra_channels_is_refused():
    with pytest.raises(RowError, match="5 extra input channels") as error:
        condition(REQUEST, Model(extra_channels=5))
    assert error.value.status == "bad_input"
