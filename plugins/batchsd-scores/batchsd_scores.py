"""Scores `clip_score` and `aesthetic`, and the filter `safety`, on transformers' CLIP. Weights are folders of yours:

    [plugin.batchsd-scores]
    clip = "./clip-vit-large-patch14"        # CLIPModel with its tokenizer, as on the hub
    aesthetic = "./sac+logos+ava1-l14-linearMSE.pth"
    safety = "./stable-diffusion-v1-5/safety_checker"

    clip_score = cos(text, image), -1 to 1 (Radford et al., 2021; elsewhere often times 100)
    aesthetic  = LAION's improved predictor, about 1 to 10: five linear layers on the normalised image embedding
    safety     = CompVis' checker: the image's cosine to 17 concepts, each with a threshold

Nothing is downloaded, pickles are read with weights_only, no remote code is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchsd import Filter, Request, Score, UsageError, hookimpl

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
AESTHETIC_WIDTHS = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}  # dropouts lie between


def pixels(pictures: Sequence[np.ndarray], side: int, device: str) -> Tensor:
    """CLIP's view of pictures: the shorter side bicubically to `side`, the middle square, normalised. B 3 S S."""
    from PIL import Image

    views = []
    for picture in pictures:
        height, width = picture.shape[:2]
        short = min(height, width)
        size = (side * width // short, side * height // short)
        resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        views.append(np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255)
    normal = (np.stack(views) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(normal).permute(0, 3, 1, 2).to(device)


def unit(embeds_BD: Tensor) -> Tensor:
    return embeds_BD / embeds_BD.norm(dim=-1, keepdim=True)


def load_clip(folder: str, device: str) -> Any:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()


def image_embeds(clip: Any, pictures: Sequence[np.ndarray], device: str) -> Tensor:
    """Unit image embeddings B D."""
    vision = clip.vision_model(pixel_values=pixels(pictures, clip.config.vision_config.image_size, device))
    return unit(clip.visual_projection(vision.pooler_output))


def load_clip_score(settings: Any, device: str) -> Callable[..., list[float]]:
    from transformers import CLIPTokenizer

    clip = load_clip(settings["clip"], device)
    tokenizer = CLIPTokenizer.from_pretrained(settings["clip"], local_files_only=True)
    length = clip.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(requests: Sequence[Request], pictures: Sequence[np.ndarray]) -> list[float]:
        texts = [request.prompt for request in requests]
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        text = clip.text_model(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))
        text_BD = unit(clip.text_projection(text.pooler_output))
        found: list[float] = (text_BD * image_embeds(clip, pictures, device)).sum(-1).tolist()
        return found

    return score


def aesthetic_head(path: str) -> nn.Module:
    """The layers of a `.pth` or `.safetensors`, their names `layers.<n>.weight`. Raises UsageError for another file."""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    wanted = {f"layers.{n}.weight": (out, into) for n, (into, out) in AESTHETIC_WIDTHS.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if name.endswith(".weight")}
    if found != wanted:
        raise UsageError(f"{path}: is no LAION aesthetic head: has {found}, wanted {wanted}")
    layers = []
    for n, (into, out) in AESTHETIC_WIDTHS.items():
        layer = nn.Linear(into, out)
        layer.load_state_dict({name: state[f"layers.{n}.{name}"] for name in ("weight", "bias")})
        layers.append(layer)
    return nn.Sequential(*layers).eval()


def load_aesthetic(settings: Any, device: str) -> Callable[..., list[float]]:
    clip = load_clip(settings["clip"], device)
    head = aesthetic_head(settings["aesthetic"]).to(device)
    if clip.config.projection_dim != 768:
        raise UsageError(f"{settings['clip']}: the aesthetic head wants CLIP ViT-L/14's 768 numbers a picture")

    @torch.no_grad()
    def score(requests: Sequence[Request], pictures: Sequence[np.ndarray]) -> list[float]:
        found: list[float] = head(image_embeds(clip, pictures, device))[:, 0].tolist()
        return found

    return score


class SafetyChecker(nn.Module):
    """CompVis' checker under the names of its weights: vision_model, visual_projection, concepts and thresholds."""

    def __init__(self, config: Any) -> None:
        from transformers import CLIPVisionModel

        super().__init__()
        size = config.projection_dim
        self.side = config.vision_config.image_size
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, size, bias=False)
        for name, count in (("concept", 17), ("special_care", 3)):
            self.register_parameter(f"{name}_embeds", nn.Parameter(torch.ones(count, size)))
            self.register_parameter(f"{name}_embeds_weights", nn.Parameter(torch.ones(count)))

    def forward(self, pixels_B3SS: Tensor) -> list[str | None]:
        embeds_BD = unit(self.visual_projection(self.vision_model(pixel_values=pixels_B3SS).pooler_output))
        special_BK = (embeds_BD @ unit(self.special_care_embeds).T - self.special_care_embeds_weights).double()
        concept_BK = (embeds_BD @ unit(self.concept_embeds).T - self.concept_embeds_weights).double()
        # Once a special concept is seen all thresholds fall by 0.01; three decimals, as the original counts.
        careful_B1 = (special_BK.round(decimals=3) > 0).any(1, keepdim=True) * 0.01
        excess_BK = (concept_BK + careful_B1).round(decimals=3)
        said: list[str | None] = []
        for row in excess_BK.tolist():
            seen = [i for i, excess in enumerate(row) if excess > 0]
            said.append(f"unsafe: over the threshold of concept {', '.join(map(str, seen))}" if seen else None)
        return said


def load_safety(settings: Any, device: str) -> Callable[..., list[str | None]]:
    from transformers import CLIPConfig

    folder = Path(settings["safety"])
    checker = SafetyChecker(CLIPConfig.from_pretrained(folder, local_files_only=True))
    file = folder / "model.safetensors"
    if file.exists():
        from safetensors.torch import load_file

        state = load_file(file)
    else:
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    state.pop("vision_model.vision_model.embeddings.position_ids", None)  # a buffer in old files
    own = checker.state_dict()
    if not any(name.startswith("vision_model.vision_model.") for name in own):  # transformers >= 5.6 or so
        state = {name.replace("vision_model.vision_model.", "vision_model."): tensor for name, tensor in state.items()}
    checker.load_state_dict(state)
    checker.to(device).eval()

    @torch.no_grad()
    def judge(requests: Sequence[Request], pictures: Sequence[np.ndarray]) -> list[str | None]:
        return checker(pixels(pictures, checker.side, device))

    return judge


@hookimpl
def register_scores() -> dict[str, Score]:
    return {
        "clip_score": Score(load_clip_score, files=("clip",)),
        "aesthetic": Score(load_aesthetic, files=("clip", "aesthetic")),
    }


@hookimpl
def register_filters() -> dict[str, Filter]:
    return {"safety": Filter(load_safety, files=("safety",))}
