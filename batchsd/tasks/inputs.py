"""What a row brings beside its prompt, as the tasks want it: numbers in range, pictures of the row's size.

A row's size is what it or the job says; else the init image's own, cut down to whole latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from batchsd import images
from batchsd.settings import MAX_SIZE, MIN_SIZE
from batchsd.types import Branch, ModelFacts, Request, RowError

if TYPE_CHECKING:
    import torch
    from PIL import Image

Size = tuple[int, int]
"""(width, height) in pixels, as Pillow has it."""


def number(request: Request, name: str, default: float, low: float, high: float) -> float:
    """The row's or the job's number of that name, `default` where nobody says. Raises RowError `bad_input`."""
    value = request.inputs.get(name)
    if value is None:
        return default
    try:
        found = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not low <= found <= high:
        raise RowError("bad_input", f"{name}: {str(value)[:40]!r} is not a number of {low:g} to {high:g}")
    return found


def flag(request: Request, name: str) -> bool:
    """The row's or the job's yes or no; no where nobody says. Raises RowError `bad_input`."""
    value = request.inputs.get(name)
    if value not in (None, False, True):
        raise RowError("bad_input", f"{name}: {str(value)[:40]!r} is neither true nor false")
    return bool(value)


def resize_mode(request: Request) -> str:
    """How images of another aspect are fitted: crop, pad or stretch. Raises RowError `bad_input`."""
    value = request.inputs.get("resize") or "crop"
    if value not in images.RESIZES:
        raise RowError(
            "bad_input", f"resize: {str(value)[:40]!r} is unknown; have {', '.join(images.RESIZES)}"
        )
    return str(value)


def begin_of(steps: int, strength: float) -> int:
    """Steps that are skipped: diffusers' t_start, so that int(steps * strength) are taken."""
    return max(steps - int(steps * strength), 0)


def needed(request: Request, name: str) -> bytes:
    """The bytes of an image that the task cannot do without. Raises RowError `bad_input`; see `naming`."""
    content = request.inputs.get(name)
    if content is None:
        raise RowError("bad_input", f"null; task {request.task!r} needs it")
    return content


@contextmanager
def naming(column: str) -> Iterator[None]:
    """Puts the column's name before what is wrong with its image."""
    try:
        yield
    except RowError as error:
        raise RowError(error.status, f"{column}: {error}") from None


def init_image(request: Request, factor: int) -> Image.Image:
    """The row's `init_image`, RGB, at the row's size. Raises RowError."""
    with naming("init_image"):
        return sized_init_image(request, factor)[0]


def sized_init_image(request: Request, factor: int) -> tuple[Image.Image, Size]:
    """The row's `init_image` at the row's size, and the size that it had (turned upright)."""
    picture = images.rgb(needed(request, "init_image"))
    size = row_size(request, factor, picture.size)
    return images.fitted(picture, size, resize_mode(request)), picture.size


def row_size(request: Request, factor: int, own: Size) -> Size:
    """The row's size, a side that nobody gives by the image's aspect. Raises RowError `bad_input`."""
    width, height = request.width, request.height
    if width is None and height is None:
        width, height = (side // factor * factor for side in own)
    elif width is None:
        assert height is not None
        width = round(own[0] * height / own[1] / factor) * factor
    elif height is None:
        height = round(own[1] * width / own[0] / factor) * factor
    assert width is not None and height is not None
    for name, side in (("width", width), ("height", height)):
        if not MIN_SIZE <= side <= MAX_SIZE or side % factor:
            raise RowError(
                "bad_input",
                f"{name} {side}: must be {MIN_SIZE} to {MAX_SIZE} and a multiple of {factor}; give the row a "
                f"size (its image has {own[0]} x {own[1]} pixels)",
            )
    return width, height


def with_channels(branches: tuple[Branch, ...], channels_CHW: torch.Tensor) -> tuple[Branch, ...]:
    """The branches, each with the same extra input channels."""
    return tuple(Branch(branch.prompt, channels_CHW, branch.added) for branch in branches)


def check_channels(request: Request, model: ModelFacts, made_for: Mapping[int, str]) -> None:
    """Refuses a checkpoint whose extra channels the task cannot fill. Raises RowError `bad_input`."""
    if model.extra_channels not in made_for:
        kinds = " or ".join(f"{count} ({kind})" for count, kind in made_for.items())
        raise RowError(
            "bad_input",
            f"task {request.task!r} is for checkpoints with {kinds} extra input channels; this one has "
            f"{model.extra_channels}",
        )


def latent_nearest(values_1HW: Any, factor: int) -> torch.Tensor:
    """Every factor-th pixel: torch's nearest interpolation to latent size."""
    return values_1HW[:, ::factor, ::factor].contiguous()
