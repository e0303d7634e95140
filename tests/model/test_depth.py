"""The checkpoint's depth network against transformers' own classes, small and with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchsd.model.depth import CONVENTIONS, DepthEstimator, load_depth_estimator, net_size
from batchsd.model.folder import read_folder
from batchsd.model.parts import DepthParts
from batchsd.types import UsageError

PLAIN: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64,
    "patch_size": 16, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 32, 32],
    "fusion_hidden_size": 16, "reassemble_factors": [4, 2, 1, 0.5],
}  # fmt: skip
HYBRID = {
    **PLAIN, "is_hybrid": True, "neck_ignore_stages": [0, 1], "reassemble_factors": [1, 1, 1, 0.5],
    "neck_hidden_sizes": [64, 128, 32, 32], "backbone_featmap_shape": [1, 256, 4, 4],
    "backbone_config": {
        "model_type": "bit", "global_padding": "same", "layer_type": "bottleneck", "depths": [1, 1, 1],
        "hidden_sizes": [64, 128, 256], "embedding_size": 64, "num_groups": 8,
        "out_features": ["stage1", "stage2", "stage3"], "embedding_dynamic_padding": True,
    },
}  # fmt: skip


def random_network(config: dict[str, Any]) -> Any:
    """transformers' DPT with weights large enough that its map is not flat."""
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(0)
    network = DPTForDepthEstimation(DPTConfig.from_dict(config)).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    network.head.head[-2].bias.fill_(1.0)
    return network


def write_depth_estimator(checkpoint: Path, config: dict[str, Any], side: int = 64) -> Any:
    """Puts a random depth network and its preprocessor into a checkpoint folder, as SD2-depth has them."""
    network = random_network(config)
    network.save_pretrained(checkpoint / "depth_estimator")
    half = [0.5, 0.5, 0.5]
    keys = {"size": {"height": side, "width": side}, "resample": 2, "image_mean": half, "image_std": half}
    (checkpoint / "feature_extractor").mkdir()
    (checkpoint / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(keys))
    return network


def estimator(network: Any) -> DepthEstimator:
    parts = DepthParts(network.config.to_dict(), network.state_dict(), "there", {"size": 64})
    return DepthEstimator(parts, torch.device("cpu"))


def picture(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    grown = torch.from_numpy(small).permute(2, 0, 1)[None].float()
    return torch.nn.functional.interpolate(grown, (height, width), mode="bilinear")[0].permute(1, 2, 0).byte().numpy()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": {"height": 64, "width": 96}, "resample": 3, "image_mean": [0.485, 0.456, 0.406]},
        {"size": 64, "keep_aspect_ratio": True, "ensure_multiple_of": 32, "image_std": [0.2, 0.3, 0.4]},
    ],
)
def test_diffusers_convention_is_transformers_processor(config: dict[str, Any]) -> None:
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    half = {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    theirs = DPTImageProcessorPil(**{**half, **config})(picture(70, 45), return_tensors="pt").pixel_values
    ours = CONVENTIONS["diffusers"](picture(70, 45), config)
    assert ours.shape == theirs.shape
    std = min(config.get("image_std", [0.5]))
    # Sums that end near a half: Pillow and torch round them after each of two passes.
    assert (ours - theirs).abs().max() <= 2.01 / 255 / std
    assert (ours - theirs).abs().mean() < 0.1 / 255 / std


def test_stability_convention_is_opencvs_cubic() -> None:
    """Keys' kernel with a = -0.75, sides of 32: 70 x 45 -> 384 x 256, since 384/70 is the smaller change."""
    found = CONVENTIONS["stability"](picture(70, 45), {})[0].numpy()
    assert found.shape == (3, 384, 256)

    def kernel(x: np.ndarray) -> np.ndarray:
        a, x = -0.75, np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        return np.where(x <= 1, near, np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0))

    def weights(small: int, large: int) -> np.ndarray:
        at = (np.arange(large) + 0.5) * small / large - 0.5
        total = np.zeros((large, small))
        for offset in range(-1, 3):
            place = np.floor(at).astype(int) + offset
            np.add.at(total, (np.arange(large), place.clip(0, small - 1)), kernel(at - place))
        return total

    values = picture(70, 45).astype(float) / 127.5 - 1
    expected = np.einsum("Hh,Ww,hwc->cHW", weights(70, 384), weights(45, 256), values)
    assert np.abs(found - expected).max() < 1e-4


def test_net_sizes_are_midas() -> None:
    """Its `Resize` of 384, keep_aspect_ratio, multiples of 32, "minimal"."""
    sizes = {(480, 640): (384, 512), (512, 512): (384, 384), (1024, 512): (768, 384), (300, 300): (384, 384)}
    assert {size: net_size(size, (384, 384), 32, True) for size in sizes} == sizes
    assert net_size((4096, 16), (384, 384), 32, True)[1] == 32


@pytest.mark.parametrize("config", [PLAIN, HYBRID], ids=["plain", "hybrid"])
def test_estimates_what_transformers_does(config: dict[str, Any]) -> None:
    network = random_network(config)
    ours = estimator(network)(picture(48, 80))
    with torch.no_grad():
        theirs = network(CONVENTIONS["diffusers"](picture(48, 80), {"size": 64})).predicted_depth[0].numpy()
    assert ours.dtype == np.float32 and theirs.std() > 0.01
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("config", [PLAIN, HYBRID], ids=["plain", "hybrid"])
def test_a_picture_that_is_not_square_keeps_its_aspect(config: dict[str, Any]) -> None:
    """transformers has no way in for it; its parts, called one by one, have."""
    network = random_network(config)
    ours = estimator(network)(picture(48, 80), "stability")
    pixels = CONVENTIONS["stability"](picture(48, 80), {"size": 64})
    grid = (pixels.shape[2] // 16, pixels.shape[3] // 16)
    with torch.no_grad():
        if network.config.is_hybrid:
            network.dpt.embeddings.image_size = tuple(pixels.shape[2:])
        found = network.dpt(pixels, output_hidden_states=True)
        layers = list(found.hidden_states[1:])
        if network.config.is_hybrid:
            layers = [*found.intermediate_activations, *layers[2:4]]
        theirs = network.head(network.neck(layers, *grid))[0].numpy()
    assert ours.shape == theirs.shape == (32, 64)
    assert np.abs(ours - theirs).max() < 1e-5


def test_a_picture_is_asked_once_and_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    import batchsd.model.depth as module

    monkeypatch.setattr(module, "_MAPS_KEPT", 2)
    asked = estimator(random_network(PLAIN))
    one, two, three = picture(32, 32), picture(32, 48), picture(48, 32)
    first = asked(one)
    assert asked(one.copy()) is first, "equal pixels are one picture"
    assert asked(one, "stability") is not first
    for other in (two, three):
        asked(other)
    assert len(asked._maps) == 2 and asked(one) is not first
    assert np.array_equal(asked(one), first)


def test_a_folder_brings_its_network_and_preprocessor(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(checkpoint, tmp_path / "made")
    network = write_depth_estimator(tmp_path / "made", PLAIN, side=32)
    found = read_folder(tmp_path / "made").depth
    assert found is not None and found.preprocessor["size"] == {"height": 32, "width": 32}
    assert CONVENTIONS["diffusers"](picture(9, 9), found.preprocessor).shape == (1, 3, 32, 32)
    loaded = load_depth_estimator(found)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_what_cannot_be_built_is_named() -> None:
    network = random_network(PLAIN)
    state = dict(network.state_dict())
    with pytest.raises(UsageError, match="there: a depth estimator of type 'zoedepth'"):
        load_depth_estimator(DepthParts({"model_type": "zoedepth"}, state, "there"))
    del state["head.head.0.weight"]
    with pytest.raises(UsageError, match=r"there: 1 tensor missing, first 'head.head.0.weight'"):
        load_depth_estimator(DepthParts(network.config.to_dict(), state, "there"))
    halves = {name: value.half() for name, value in network.state_dict().items()}
    loaded = load_depth_estimator(DepthParts(network.config.to_dict(), halves, "there"))
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
