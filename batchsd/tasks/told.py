"""What some networks are told beside the text: SDXL the picture's sizes, a distilled one (LCM) its guidance.

Both go with a branch, as `Branch.added`, under diffusers' names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from batchsd.types import ModelFacts, Request, RowError

if TYPE_CHECKING:
    import torch

SIZES = ("original_size", "crops_coords_top_left", "target_size")
"""Manifest columns, each two numbers: [height, width], [top, left], [height, width], as SDXL's pipeline takes them.

Left out they are the picture's own size, [0, 0], and again the picture's size; both branches are told the same.
"""


def sizes_told(request: Request, model: ModelFacts, shape_CHW: Sequence[int]) -> Mapping[str, torch.Tensor]:
    """`time_ids` (6,) where the network takes them and the row says any of `SIZES`. Raises RowError `bad_input`.

    Nothing where the row says none: the engine then tells the picture's own size.
    """
    import torch

    if not model.takes_sizes or all(request.inputs.get(name) is None for name in SIZES):
        return {}
    own = tuple(side * model.scale_factor for side in shape_CHW[1:])
    pairs = [_pair(request, name, unsaid) for name, unsaid in zip(SIZES, (own, (0, 0), own), strict=True)]
    return {"time_ids": torch.tensor([number for pair in pairs for number in pair], dtype=torch.float32)}


def _pair(request: Request, name: str, unsaid: Sequence[int]) -> Sequence[float]:
    value: Any = request.inputs.get(name)
    if value is None:
        return unsaid
    numbers = list(value) if isinstance(value, list | tuple) else []
    plain = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n)]
    if len(numbers) != 2 or len(plain) != 2:
        raise RowError("bad_input", f"{name}: {str(value)[:40]!r} is no list of two numbers, such as [1024, 768]")
    return plain


def guidance_told(guidance: float, dim: int) -> Mapping[str, torch.Tensor]:
    """`timestep_cond` (dim,): sines, then cosines, of 1000 (g - 1) / 10000^(i / (dim/2 - 1)); nothing where dim is 0.

    As LatentConsistencyModelPipeline has it, in float32 (Luo et al. 2023, after Kingma et al.'s VDM).
    """
    import torch

    if not dim:
        return {}
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1))
    angles = torch.tensor(guidance - 1, dtype=torch.float32) * 1000.0 * torch.exp(exponents)
    told = torch.cat([angles.sin(), angles.cos()])
    return {"timestep_cond": torch.nn.functional.pad(told, (0, dim % 2))}
