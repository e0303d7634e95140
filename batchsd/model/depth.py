"""The checkpoint's own depth network, transformers' DPT (Ranftl et al. 2021): a picture -> how near each part is.

It runs in float32 whatever the rest has: its norms overflow in half types, and it is asked once a picture. It is
built when a row first needs it. Two ways to bring a picture to its size, by name (`CONVENTIONS`):
diffusers    squashed to 384 x 384, bilinear: as diffusers' pipeline does it, by the folder's `feature_extractor`
stability    the aspect kept, sides multiples of 32, cubic: what Stability's own script does (MiDaS' `Resize`)
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from batchsd.model.parts import DepthParts
from batchsd.model.weights import fill
from batchsd.types import UsageError

_MAPS_KEPT = 64  # 384 x 384 numbers each: 38 MB
_NET_SIDE, _NET_MULTIPLE = 384, 32

# Pillow's numbers for the ways of resampling, as preprocessor_config.json has them.
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def as_diffusers(picture_HW3: np.ndarray, preprocessor: Mapping[str, Any]) -> Tensor:
    """uint8 H W 3 -> 1 3 h w as transformers' DPTImageProcessor of that config makes it; SD2-depth's by default."""
    multiple, keep = preprocessor.get("ensure_multiple_of", 1), preprocessor.get("keep_aspect_ratio", False)
    sides = net_size(picture_HW3.shape[:2], _net(preprocessor), multiple, keep)
    mode = _RESAMPLE[preprocessor.get("resample", 2)]
    pixels_13HW = torch.from_numpy(np.array(picture_HW3)).permute(2, 0, 1)[None].contiguous()
    # On uint8, with rounding: what Pillow computes.
    resized = F.interpolate(pixels_13HW, sides, mode=mode, antialias=mode != "nearest")
    mean_C, std_C = (torch.tensor(preprocessor.get(f"image_{name}", [0.5] * 3)) for name in ("mean", "std"))
    return (resized.float() / 255 - mean_C[:, None, None]) / std_C[:, None, None]


def as_stability(picture_HW3: np.ndarray, preprocessor: Mapping[str, Any]) -> Tensor:
    """uint8 H W 3 -> 1 3 h w as MiDaS' dpt_hybrid is fed: OpenCV's cubic on floats, which is torch's, in [-1, 1]."""
    sides = net_size(picture_HW3.shape[:2], _net(preprocessor), _NET_MULTIPLE, keep_aspect=True)
    pixels_13HW = torch.from_numpy(np.array(picture_HW3)).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(pixels_13HW, sides, mode="bicubic", align_corners=False) * 2 - 1


CONVENTIONS: Mapping[str, Callable[[np.ndarray, Mapping[str, Any]], Tensor]] = {
    "diffusers": as_diffusers,
    "stability": as_stability,
}


def _net(preprocessor: Mapping[str, Any]) -> tuple[int, int]:
    """The (height, width) that the network was made for."""
    size = preprocessor.get("size", _NET_SIDE)
    return (size["height"], size["width"]) if isinstance(size, Mapping) else (size, size)


def net_size(size_hw: tuple[int, ...], net_hw: tuple[int, int], multiple: int, keep_aspect: bool) -> tuple[int, int]:
    """The (height, width) that a picture gets: of the two scales the one nearer to 1, both sides rounded."""
    scales = [net / side for net, side in zip(net_hw, size_hw, strict=True)]
    if keep_aspect:
        scales = [min(reversed(scales), key=lambda scale: abs(1 - scale))] * 2
    height, width = (
        max(multiple, round(scale * side / multiple) * multiple) for scale, side in zip(scales, size_hw, strict=True)
    )
    return height, width


@dataclass
class DepthEstimator:
    """Estimates with the network of `parts`, on `device`; pictures seen lately are not asked again."""

    parts: DepthParts
    device: torch.device
    network: Any = None
    _maps: OrderedDict[bytes, np.ndarray] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def __call__(self, picture_HW3: np.ndarray, convention: str = "diffusers") -> np.ndarray:
        """An upright RGB picture, uint8 H W 3 -> float32 h w at the network's size, greater is nearer.

        Raises `UsageError` where the checkpoint's depth network cannot be built.
        """
        head = f"{convention} {picture_HW3.shape}".encode()
        key = hashlib.blake2b(head + picture_HW3.tobytes(), digest_size=16).digest()
        with self._lock:
            if key not in self._maps:
                self._maps[key] = self._estimate(CONVENTIONS[convention](picture_HW3, self.parts.preprocessor))
            self._maps.move_to_end(key)
            while len(self._maps) > _MAPS_KEPT:
                self._maps.popitem(last=False)
            return self._maps[key]

    @torch.no_grad()
    def _estimate(self, pixels_13HW: Tensor) -> np.ndarray:
        if self.network is None:
            self.network = load_depth_estimator(self.parts).to(self.device)
        grid = self._take(pixels_13HW.shape[-2], pixels_13HW.shape[-1])
        hook = self.network.neck.register_forward_pre_hook(lambda module, given: (given[0], *grid))
        try:
            return self.network(pixels_13HW.to(self.device)).predicted_depth[0].float().cpu().numpy()
        finally:
            hook.remove()

    def _take(self, height: int, width: int) -> tuple[int, int]:
        """Makes the network take pictures of that size, and gives the grid of its patches.

        It can (it stretches its positions), but transformers lets a hybrid see its config's size alone, and takes
        every grid for a square one.
        """
        config = self.network.config
        if config.is_hybrid:
            self.network.dpt.embeddings.image_size = (height, width)
        return height // config.patch_size, width // config.patch_size


def load_depth_estimator(parts: DepthParts) -> Any:
    """transformers' DPTForDepthEstimation with these weights, in float32 on the CPU.

    Raises `UsageError` where the config is of another network, or the weights are not its own.
    """
    from transformers import DPTConfig, DPTForDepthEstimation

    kind = parts.config.get("model_type", "dpt")
    if kind != "dpt":
        raise UsageError(f"{parts.where}: a depth estimator of type {kind!r} is not supported (only 'dpt')")
    with torch.device("meta"):
        network = DPTForDepthEstimation(DPTConfig.from_dict(dict(parts.config)))
    if network.backbone is not None:
        raise UsageError(f"{parts.where}: a depth estimator with a backbone of another kind is not supported")
    fill(network, {name: value.float() for name, value in parts.state.items()}, parts.where)
    return network.eval().requires_grad_(False)
