"""Depth to image: a fifth input channel tells the network how far away each part of the picture is.

channel = 2 (d - min) / (max - min) - 1,   d the map at latent size (bicubic), min and max its own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from batchsd import images
from batchsd.tasks.image import STRENGTH
from batchsd.tasks.inputs import (
    begin_of,
    check_channels,
    flag,
    init_image,
    naming,
    number,
    resize_mode,
    with_channels,
)
from batchsd.tasks.text import draw_noise, latent_shape, prompted
from batchsd.types import Conditioning, ModelFacts, Request, RowError

if TYPE_CHECKING:
    import torch

CONVENTIONS = ("diffusers", "stability")  # of feeding the depth network (model/depth.py), the default first


@dataclass(frozen=True, slots=True)
class DepthTask:
    """Draws over a depth map, as diffusers' StableDiffusionDepth2ImgPipeline does; greater is nearer.

    With an init image, draws in order: its posterior, then the noise; without one, the noise alone, and
    `strength` has no meaning. Each is one `torch.randn` of (1, C, H/f, W/f) in float32. Where the row brings no
    map, the checkpoint's own depth network looks at the init image, as it is fitted to the row's size.
    """

    columns: tuple[str, ...] = ("depth", "init_image", "strength", "resize", "depth_convention", "keep_depth")

    def __call__(self, request: Request, model: ModelFacts, generator: torch.Generator) -> Conditioning:
        check_channels(request, model, {1: "depth"})
        strength = number(request, "strength", STRENGTH, 0, 1)
        resize, picture, clean_CHW = resize_mode(request), None, None
        shape: Sequence[int]
        if request.inputs.get("init_image") is None:
            shape = latent_shape(request, model)
        else:
            picture = init_image(request, model.scale_factor)
            clean_CHW = model.encode_image(images.to_tensor(picture), generator)
            shape = clean_CHW.shape
        made = {}
        if request.inputs.get("depth") is not None:
            with naming("depth"):
                map_HW = images.field(request.inputs["depth"])
        else:
            map_HW, resize = estimated(request, model, picture), "stretch"
            if flag(request, "keep_depth"):
                made["estimated_depth"] = images.grey16(map_HW)
        with naming("depth"):
            channel_1HW = depth_channel(map_HW, (shape[1], shape[2]), resize)
        branches, weights = prompted(request, model, shape)
        return Conditioning(
            branches=with_channels(branches, channel_1HW),
            weights=weights,
            noise_CHW=draw_noise(shape, generator),
            clean_CHW=clean_CHW,
            begin=0 if clean_CHW is None else begin_of(request.steps, strength),
            made=made,
        )


def estimated(request: Request, model: ModelFacts, picture: images.Picture | None) -> np.ndarray:
    """The map that the checkpoint's depth network sees in the picture, float32. Raises RowError."""
    convention = request.inputs.get("depth_convention") or CONVENTIONS[0]
    if convention not in CONVENTIONS:
        said = f"{str(convention)[:40]!r} is unknown; have {', '.join(CONVENTIONS)}"
        raise RowError("bad_input", f"depth_convention: {said}")
    if picture is None:
        raise RowError("bad_input", "depth: null, and no init_image to estimate it from; give the row one of them")
    map_HW = model.estimate_depth(np.asarray(picture), convention)
    if map_HW is None:
        raise RowError("bad_input", "depth: null, and this checkpoint has no depth estimator; give the row a depth map")
    if not np.isfinite(map_HW).all():
        raise RowError("nan", "the checkpoint's depth estimator gave numbers that are not finite for this init_image")
    return map_HW


def depth_channel(map_HW: np.ndarray, size_hw: tuple[int, int], resize: str = "stretch") -> torch.Tensor:
    """A depth map of any scale -> (1, h, w) in [-1, 1], float32.

    A flat map gives -1, as training had it (it divided by max - min + 0.001); diffusers gives NaN there.
    """
    import torch

    height, width = size_hw
    cut_HW = np.ascontiguousarray(images.at_aspect(map_HW, (width, height), resize))
    small_1HW = torch.nn.functional.interpolate(
        torch.from_numpy(cut_HW)[None, None], size_hw, mode="bicubic", align_corners=False
    )[0]
    low, high = small_1HW.min(), small_1HW.max()
    if not torch.isfinite(high - low) or high - low <= 1e-6 * small_1HW.abs().max():
        return torch.full_like(small_1HW, -1.0)
    return 2.0 * (small_1HW - low) / (high - low) - 1.0
