"""Learnt words, against diffusers' own loading of the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from batchsd.model.checkpoint import load
from batchsd.types import UsageError
from tests.tasks.xl import write_xl


def test_a_word_of_one_vector_equals_diffusers(checkpoint: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    save_file({"<shiny>": torch.randn(1, 32)[0]}, tmp_path / "w.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipe.load_textual_inversion(str(tmp_path / "w.safetensors"))
    expected = pipe.encode_prompt("a <shiny> red cube", "cpu", 1, False)[0]
    model = load(checkpoint, embeddings=[str(tmp_path / "w.safetensors")])
    assert torch.allclose(model.encode_text(["a <shiny> red cube"]), expected, atol=1e-5)
    assert torch.allclose(model.encode_text(["a red cube"]), load(checkpoint).encode_text(["a red cube"]), atol=1e-6)


@pytest.mark.parametrize("layout", ["A1111", "emb_params"])
def test_a_word_of_several_vectors(checkpoint: Path, tmp_path: Path, layout: str) -> None:
    vectors = torch.randn(2, 32)
    if layout == "A1111":
        file = tmp_path / "glow.pt"
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x", "step": 5}, file)
    else:
        file = tmp_path / "glow.safetensors"
        save_file({"emb_params": vectors}, file)
    model = load(checkpoint, embeddings=[str(file)])
    first = model.text.tokenizer.convert_tokens_to_ids("glow")
    ids = model.text.ids(["a glow cube"])[0].tolist()
    assert [first, first + 1] == ids[ids.index(first) :][:2] and ids.count(first) == 1
    assert torch.equal(model.text.embedding.weight[first : first + 2], vectors)
    plain = load(checkpoint).text
    assert model.text.tokens_cut("glow " * 40) - plain.tokens_cut("a " * 40) == 40


@pytest.mark.parametrize("count", [1, 3])
def test_sdxl_teaches_both_encoders_as_diffusers_does(tmp_path: Path, count: int) -> None:
    """The pooled text too, which must be taken at the end mark, though the new words have greater numbers."""
    from diffusers import StableDiffusionXLPipeline

    folder = write_xl(tmp_path / "xl")
    vectors = {"clip_l": torch.randn(count, 64), "clip_g": torch.randn(count, 128)}
    save_file(vectors, tmp_path / "<glow>.safetensors")
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    for key, encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer), ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):  # fmt: skip
        pipe.load_textual_inversion(vectors[key], token="<glow>", text_encoder=encoder, tokenizer=tokenizer)
    states, _, pooled, _ = pipe.encode_prompt("a <glow> cube", device="cpu", do_classifier_free_guidance=False)
    ours, our_pooled = load(folder, embeddings=[str(tmp_path / "<glow>.safetensors")]).encode_prompts(["a <glow> cube"])
    assert torch.allclose(ours, states, atol=1e-4) and our_pooled is not None
    assert torch.allclose(our_pooled, pooled, atol=1e-4)
    plain, _ = load(folder).encode_prompts(["a <glow> cube"])
    assert not torch.allclose(ours, plain, atol=1e-2)


def test_what_does_not_fit_is_one_clear_line(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    for state, message in (
        ({"<w>": torch.zeros(48)}, "vectors of 48 numbers, this text encoder has 32"),
        ({"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 32)}, "for 2 text encoder"),
        ({"a": torch.zeros(32), "b": torch.zeros(32)}, "not a textual inversion"),
        ({"red</w>": torch.zeros(32)}, "already in the vocabulary"),
    ):
        save_file(state, file)
        with pytest.raises(UsageError, match="model.embeddings: .*w.safetensors") as error:
            load(checkpoint, embeddings=[str(file)])
        assert message in str(error.value)
