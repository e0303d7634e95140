"""On random weights: the architectures are CLIP's and CompVis', the numbers mean nothing. Oracles: transformers'
whole CLIPModel with its own processor, and diffusers' StableDiffusionSafetyChecker. The exact configs: pytest -m heavy.
"""

from __future__ import annotations

from pathlib import Path

import batchsd_scores
import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from batchsd.testing import check_filter, check_score, example_pictures, example_request

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
EXACT_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                "patch_size": 14, "image_size": 224}  # fmt: skip
EXACT_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
EXACT = [False, pytest.param(True, marks=pytest.mark.heavy)]
PROMPTS = ["a red cube", "two blue spheres on a floor", "green"]


def vision(exact: bool) -> dict:
    return EXACT_VISION if exact else {**SMALL, "patch_size": 8, "image_size": 32}


def clip_folder(folder: Path, exact: bool = False) -> Path:
    from batchsd.training.tokenizer import write_tokenizer

    torch.manual_seed(0)
    write_tokenizer(folder, ["red", "blue", "green", "cube", "sphere", "on", "floor", "two", "a"])
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id, **(EXACT_TEXT if exact else SMALL)}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision(exact), projection_dim=768)).save_pretrained(folder)
    return folder


def head_file(path: Path) -> Path:
    torch.manual_seed(1)
    state = {}
    for n, (into, out) in batchsd_scores.AESTHETIC_WIDTHS.items():
        layer = torch.nn.Linear(into, out)
        state |= {f"layers.{n}.weight": layer.weight.detach(), f"layers.{n}.bias": layer.bias.detach()}
    torch.save(state, path)
    return path


def safety_folder(folder: Path, exact: bool = False):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    torch.manual_seed(2)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision(exact), projection_dim=768))
    for name in ("concept_embeds", "special_care_embeds"):
        getattr(checker, name).data.normal_()
        getattr(checker, f"{name}_weights").data.normal_(0.03, 0.02)
    checker.save_pretrained(folder)
    return checker.eval()


@pytest.mark.parametrize("exact", EXACT)
def test_clip_score_is_the_cosine_of_transformers_own_embeddings(tmp_path: Path, exact: bool) -> None:
    folder = clip_folder(tmp_path / "clip", exact)
    settings = {"clip": str(folder)}
    score = batchsd_scores.register_scores()["clip_score"]
    check_score(score, settings)
    pictures = example_pictures()
    found = score.load(settings, "cpu")([example_request(prompt=prompt) for prompt in PROMPTS], pictures)
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    for prompt, picture, value in zip(PROMPTS, pictures, found, strict=True):
        tokens = tokenizer([prompt], return_tensors="pt")
        out = model(pixel_values=oracle_pixels(picture, vision(exact)["image_size"]), **tokens)
        expected = torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds)
        assert value == pytest.approx(expected.item(), abs=1e-5)


def oracle_pixels(picture: np.ndarray, side: int) -> torch.Tensor:
    """transformers' own image processor."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return torch.as_tensor(np.asarray(processor(picture)["pixel_values"][0]))[None].float()


@pytest.mark.parametrize("exact", EXACT)
def test_aesthetic_is_five_layers_on_the_unit_embedding(tmp_path: Path, exact: bool) -> None:
    head = head_file(tmp_path / "head.pth")
    settings = {"clip": str(clip_folder(tmp_path / "clip", exact)), "aesthetic": str(head)}
    score = batchsd_scores.register_scores()["aesthetic"]
    check_score(score, settings)
    state = torch.load(head, weights_only=True)
    model = CLIPModel.from_pretrained(settings["clip"]).eval()
    for picture in example_pictures():
        (value,) = score.load(settings, "cpu")([example_request()], [picture])
        seen = oracle_pixels(picture, vision(exact)["image_size"])
        x = model(pixel_values=seen, input_ids=torch.tensor([[1, 2]])).image_embeds.double()
        for n in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{n}.weight"].double().T + state[f"layers.{n}.bias"].double()
        assert value == pytest.approx(x.item(), abs=1e-4)


def test_another_file_is_no_head(tmp_path: Path) -> None:
    torch.save({"layers.0.weight": torch.ones(2, 2)}, tmp_path / "head.pth")
    with pytest.raises(batchsd_scores.UsageError, match="is no LAION aesthetic head"):
        batchsd_scores.aesthetic_head(str(tmp_path / "head.pth"))


@pytest.mark.parametrize("exact", EXACT)
def test_safety_rejects_what_diffusers_checker_rejects(tmp_path: Path, exact: bool) -> None:
    reference = safety_folder(tmp_path, exact)
    settings = {"safety": str(tmp_path)}
    safety = batchsd_scores.register_filters()["safety"]
    check_filter(safety, settings)
    count = 3 if exact else 12
    pictures = example_pictures(count)
    pixels = batchsd_scores.pixels(pictures, vision(exact)["image_size"], "cpu")
    with torch.no_grad():
        embeds = reference.visual_projection(reference.vision_model(pixels)[1])
    concept, special = (
        torch.nn.functional.cosine_similarity(embeds, getattr(reference, name)[:1], dim=-1).detach()
        for name in ("concept_embeds", "special_care_embeds")
    )
    # Only concept 0 and special concept 0 can be seen. A bound 0.005 above all pictures is passed only by those whose
    # thresholds fall by 0.01: the nearest picture's, when its special concept is seen.
    above, nearest = float(concept.max()) + 0.005, special[concept.argmax()].item()
    cases = (9.0, float(concept.median()), True), (9.0, above, False), (nearest - 0.002, above, True)
    for careful, bound, rejects in cases[exact:]:  # the first, a plain bound, is of the second's kind
        for name, threshold in (("concept_embeds_weights", bound), ("special_care_embeds_weights", careful)):
            weights = getattr(reference, name).data
            weights[:], weights[0] = 9.0, threshold
        reference.save_pretrained(tmp_path)
        said = safety.load(settings, "cpu")([example_request()] * count, pictures)
        _, unsafe = reference(images=np.zeros((count, 8, 8, 3)), clip_input=pixels)
        assert [reason is not None for reason in said] == list(unsafe)
        assert any(unsafe) == rejects and not all(unsafe)
