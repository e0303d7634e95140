"""A single file in LDM's layout (.safetensors or .ckpt) taken apart into diffusers' names and configs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from batchsd.model.families import SD2, Family, sample_size, scheduler_config
from batchsd.model.ldm_names import openclip_state, unet_state, vae_state
from batchsd.model.midas_names import CONFIG as DEPTH_CONFIG
from batchsd.model.midas_names import depth_state
from batchsd.model.parts import DepthParts, Parts, TextParts
from batchsd.model.shapes import text_dict, unet_dict, vae_dict
from batchsd.model.sniff import family_of, prediction_of, refuse_others, task_of
from batchsd.model.tokenizer import clip_tokenizer
from batchsd.model.weights import State, metadata, read_state
from batchsd.types import UsageError

_UNET, _EMA = "model.diffusion_model.", "model_ema."
_VAE = ("first_stage_model.", "vae.")
_DEPTH = "depth_model.model."
_CLIP = {"SD1": "cond_stage_model.transformer.", "SDXL": "conditioner.embedders.0.transformer."}
_OPENCLIP = {"SD2": "cond_stage_model.model.", "SDXL": "conditioner.embedders.1.model."}
_USUAL_VAE: dict[str, Any] = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}  # of every family
# Inside the networks' prefixes, and no part of them: training losses, position numbers.
_IGNORED = ("loss.", "position_ids")


def read_single_file(path: Path, ema: bool = False) -> Parts:
    """The parts of a checkpoint file; `ema` takes the averaged U-Net where the file keeps both.

    Raises `UsageError` where it is broken, of another kind, or incomplete.
    """
    state = read_state(path)
    refuse_others(state, str(path))
    try:
        return _taken_apart(state, metadata(path), str(path), ema)
    except KeyError as missing:  # the shapes of some tensors tell the config
        raise UsageError(f"{path}: tensor {missing} is missing, as diffusers names it; is the file whole?") from None


def _taken_apart(state: State, notes: Mapping[str, str], where: str, ema: bool) -> Parts:
    unet = unet_state(_averaged(state, where) if ema else under(state, _UNET))
    family, told = family_of(state, unet, where)
    task = task_of(unet, where)
    prediction, why = prediction_of(family, state, unet, notes)
    vae = next((found for prefix in _VAE if (found := vae_state(under(state, prefix)))), {})
    unet_config = unet_dict(unet)
    heads = family.heads or [max(1, channels // 64) for channels in unet_config["block_out_channels"]]
    scheduler = scheduler_config(family, task, prediction)
    if "ztsnr" in state:
        scheduler["rescale_betas_zero_snr"] = True
    shape = list(unet["conv_in.weight"].shape)
    reasons = (
        f"{family.name} {task} ({shape[1]}-channel U-Net, cross-attention {unet_config['cross_attention_dim']}, "
        f"{family.text}) because conv_in is {shape} and {told}",
        f"prediction type {prediction} because {why}",
        f"scheduler {scheduler['_class_name']}, the family's own: a single file names none",
        *_leftovers(state, ema),
    )
    unet_config |= {
        "attention_head_dim": heads,
        "upcast_attention": prediction == "v_prediction" and family is SD2,
        "sample_size": sample_size(family, prediction),
    }
    vae_config: dict[str, Any] = {"scaling_factor": family.scaling_factor, "force_upcast": family.force_upcast}
    vae_config |= vae_dict(vae) if vae else _USUAL_VAE
    return Parts(
        where, f"{family.name} {task}", unet_config, unet, vae_config, vae, _texts(family, state, where), scheduler,
        family.zero_negative, reasons, _depth(state, where),
    )  # fmt: skip


def under(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    inside = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    return {name: v for name, v in inside.items() if not (name.startswith(_IGNORED[0]) or name.endswith(_IGNORED[1]))}


def _averaged(state: State, where: str) -> dict[str, Tensor]:
    """The U-Net's moving average. LDM leaves the dots out of its names, so they are found by those of the others."""
    names = [name for name in state if name.startswith(_UNET)]
    flat = {name: _EMA + name.removeprefix("model.").replace(".", "") for name in names}
    missing = [flat[name] for name in names if flat[name] not in state]
    if missing:
        raise UsageError(f"{where}: no averaged U-Net (EMA) in this file, '{missing[0]}' is missing")
    return {name[len(_UNET) :]: state[flat[name]] for name in names}


def _texts(family: Family, state: State, where: str) -> tuple[TextParts, ...]:
    found = []
    if prefix := _CLIP.get(family.name):
        found.append(("quick_gelu", under(state, prefix)))
    if prefix := _OPENCLIP.get(family.name):
        tower = openclip_state(under(state, prefix), projection=family is not SD2)
        found.append(("gelu", _without_last_layer(tower) if family is SD2 else tower))
    parts = []
    for (act, tensors), pad in zip(found, family.pads, strict=True):
        config: Mapping[str, Any] = {**text_dict(tensors), "hidden_act": act, "eos_token_id": 49407}
        parts.append(TextParts(config, tensors, partial(clip_tokenizer, pad), where))
    return tuple(parts)


def _depth(state: State, where: str) -> DepthParts | None:
    """The depth network that SD2-depth's file holds; None where there is none."""
    found = under(state, _DEPTH)
    return DepthParts(DEPTH_CONFIG, depth_state(found), where) if found else None


def _without_last_layer(tower: State) -> dict[str, Tensor]:
    """SD2 looks at the last layer but one: the last one is in the file for nothing."""
    last = text_dict(tower)["num_hidden_layers"] - 1
    return {name: v for name, v in tower.items() if not name.startswith(f"text_model.encoder.layers.{last}.")}


def _leftovers(state: State, ema: bool) -> tuple[str, ...]:
    """Lines about what the file holds beside the networks."""
    lines = []
    averaged = sum(name.startswith(_EMA) for name in state)
    if averaged and not ema:
        lines.append(f"{averaged} tensors of an averaged U-Net (model_ema.) are not used")
    depth = sum(name.startswith("depth_model.") for name in state)
    if depth:
        lines.append(f"{depth} tensors of a depth network (depth_model.), for rows that bring no depth map")
    known = (_UNET, _EMA, *_VAE, "cond_stage_model.", "conditioner.", "depth_model.")
    others = [name for name in state if not name.startswith(known) and "." in name]
    if others:
        lines.append(f"{len(others)} tensors of other parts are not used, first '{others[0]}'")
    return tuple(lines)
