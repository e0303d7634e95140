"""Which Stable Diffusion a single file holds, told from names, shapes and one tensor's values, with the reasons.

The order of the questions: is it something else that we can name; which text encoder; how many input channels;
noise or velocity.
"""

from __future__ import annotations

from collections.abc import Mapping

from batchsd.model.families import BY_CONTEXT, SD1, SD2, SDXL, TASKS, Family
from batchsd.model.weights import State
from batchsd.types import UsageError

# The parts of names that only these have.
_OTHERS = {
    "control_model.": "a ControlNet", "input_hint_block.": "a ControlNet", "controlnet_cond_embedding.": "a ControlNet",
    "double_blocks.": "a Flux network", "joint_blocks.": "Stable Diffusion 3", "lora_": "a LoRA (see model.loras)",
    ".lora.": "a LoRA (see model.loras)", "hada_w1": "a LyCORIS adapter", "lokr_w1": "a LyCORIS adapter",
    "embedder.model.": "Stable unCLIP", "emb_params": "a textual inversion (see model.embeddings)",
    "string_to_param": "a textual inversion (see model.embeddings)", "motion_modules.": "AnimateDiff",
}  # fmt: skip
_SD2_VELOCITY = 0.09  # ComfyUI's border for the deviation of the tensor below; noise-predicting ones lie under it


def refuse_others(state: State, where: str) -> None:
    """Raises `UsageError` where the file is of another kind, naming it where it is known."""
    for mark, what in _OTHERS.items():
        if any(mark in name for name in state):
            raise UsageError(f"{where}: this is {what}, not a Stable Diffusion 1.x, 2.x or XL checkpoint")
    if any(name.startswith("conditioner.embedders.0.model.") for name in state):
        raise UsageError(f"{where}: this is the SDXL refiner, which is not supported; take the SDXL base")
    if "conv_in.weight" in state or "down_blocks.0.resnets.0.norm1.weight" in state:
        raise UsageError(f"{where}: one network of a folder in diffusers layout; model.path is the folder above it")
    if "encoder.conv_in.weight" in state:
        raise UsageError(f"{where}: an autoencoder alone; give it as model.vae, beside a whole checkpoint")
    if not any(name.startswith("model.diffusion_model.") for name in state):
        first = next(iter(state), "nothing")
        raise UsageError(
            f"{where}: no tensor begins with 'model.diffusion_model.' (the first is '{first}'), so this is no "
            "Stable Diffusion checkpoint"
        )


def family_of(state: State, unet: State, where: str) -> tuple[Family, str]:
    """The family and what told it, from a whole single file and its U-Net under diffusers' names."""
    for prefix, family in (
        ("conditioner.embedders.1.", SDXL), ("cond_stage_model.transformer.", SD1), ("cond_stage_model.model.", SD2),
    ):  # fmt: skip
        if any(name.startswith(prefix) for name in state):
            return family, f"the text encoder lies under '{prefix}'"
    width = next((v.shape[1] for name, v in unet.items() if name.endswith("attn2.to_k.weight")), 0)
    if width not in BY_CONTEXT:
        raise UsageError(f"{where}: cross-attention of width {width}; known are {sorted(BY_CONTEXT)}")
    raise UsageError(
        f"{where}: {BY_CONTEXT[width].name} by its cross-attention ({width}), but without the text encoder; "
        "take the whole checkpoint, not the pruned one"
    )


def task_of(unet: State, where: str) -> str:
    """What the U-Net's input channels are for."""
    channels = unet["conv_in.weight"].shape[1]
    if channels not in TASKS:
        known = ", ".join(f"{n} ({task})" for n, task in TASKS.items())
        raise UsageError(f"{where}: the U-Net takes {channels} channels; known are {known}")
    return TASKS[channels]


def prediction_of(family: Family, state: State, unet: State, notes: Mapping[str, str]) -> tuple[str, str]:
    """("epsilon" or "v_prediction", the reason). `notes` are the texts in the file's header."""
    said = notes.get("modelspec.prediction_type", "").lower()
    if said in ("v", "v_prediction", "epsilon"):
        value = "epsilon" if said == "epsilon" else "v_prediction"
        return value, f"the file's header says modelspec.prediction_type = {said}"
    if "v_pred" in state:
        return "v_prediction", "the file has a tensor named v_pred"
    if family is not SD2:
        return "epsilon", f"{family.name} predicts noise unless the file says otherwise"
    if unet["conv_in.weight"].shape[1] != 4:
        return "epsilon", "SD2's depth and inpainting checkpoints predict noise"
    last = max(int(name.split(".")[1]) for name in unet if name.startswith("up_blocks."))
    bias = unet.get(f"up_blocks.{last}.attentions.2.transformer_blocks.0.norm1.bias")
    if bias is None:
        return "epsilon", "there is no last attention to tell noise from velocity by"
    deviation = float(bias.float().std(unbiased=False))
    value = "v_prediction" if deviation > _SD2_VELOCITY else "epsilon"
    side = "above" if deviation > _SD2_VELOCITY else "not above"
    return value, f"the last attention's norm1.bias deviates by {deviation:.3f}, {side} {_SD2_VELOCITY}"
