"""The families of Stable Diffusion: what the shapes of a checkpoint's tensors do not tell.

From the hub's configs of runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1, -2-base, -2-depth,
-2-inpainting and stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_END, _NULL = "<|endoftext|>", "!"

TASKS = {4: "text", 5: "depth", 8: "edit", 9: "inpaint"}
"""What a U-Net's input channels are for."""


@dataclass(frozen=True)
class Family:
    """One row of the table below. `pads` are the padding tokens of the text encoders."""

    name: str
    context_dim: int
    text: str
    heads: int | None  # None: as many as make a head 64 wide
    sample_size: int  # latents of a side, for the noise-predicting checkpoint
    scaling_factor: float
    force_upcast: bool
    pads: tuple[str, ...]
    zero_negative: bool


SD1 = Family("SD1", 768, "CLIP-L text", 8, 64, 0.18215, False, (_END,), False)
SD2 = Family("SD2", 1024, "OpenCLIP-H text", None, 64, 0.18215, False, (_NULL,), False)
SDXL = Family(
    "SDXL", 2048, "CLIP-L and OpenCLIP-bigG text", None, 128, 0.13025, True, (_END, _NULL), True
)  # fmt: skip

BY_CONTEXT = {family.context_dim: family for family in (SD1, SD2, SDXL)}

_BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "trained_betas": None,
}  # fmt: skip


def scheduler_config(family: Family, task: str, prediction: str) -> dict[str, Any]:
    """The scheduler config that the hub's folder of such a checkpoint holds."""
    if family is SDXL:
        kind: dict[str, Any] = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    elif prediction == "v_prediction" or (family is SD1 and task == "inpaint"):
        kind = {"_class_name": "DDIMScheduler"}
    else:
        kind = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    return {**_BETAS, **kind, "prediction_type": prediction}


def sample_size(family: Family, prediction: str) -> int:
    """Latents of a side; SD2 with velocity prediction was trained on at 768 pixels."""
    return 96 if family is SD2 and prediction == "v_prediction" else family.sample_size
