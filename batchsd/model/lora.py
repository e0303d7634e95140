"""LoRA: low-rank changes of weights (Hu et al. 2021), added into the networks once, when a model is loaded.

    W <- W + weight * alpha / rank * up @ down

Both spellings are understood: kohya's (`lora_unet_..._to_q.lora_down.weight`, with diffusers' or LDM's block names)
and PEFT's and diffusers' (`unet....to_q.lora_A.weight`, `.lora.down.weight`, `.processor.to_q_lora.down.weight`).
Names meet with their dots turned into underscores, as kohya writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from batchsd.model.extras import split_weight
from batchsd.model.families import BY_CONTEXT
from batchsd.model.ldm_names import unet_name
from batchsd.model.weights import read_state
from batchsd.types import UsageError

_OTHERS = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_mid": "LoRA with a middle (CP)", "oft_": "OFT",
}  # fmt: skip
_PARTS = {
    "lora_A": "down", "lora_B": "up", "lora_down": "down", "lora_up": "up", "lora.down": "down", "lora.up": "up",
    "lora_linear_layer.down": "down", "lora_linear_layer.up": "up",
}  # fmt: skip
_SUFFIX = re.compile(rf"(.+)\.({'|'.join(re.escape(part) for part in _PARTS)})(?:\.default)?\.weight")
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_PREFIXES = {
    "lora_unet_": "unet", "lora_te_": "text", "lora_te1_": "text", "lora_te2_": "text_2", "unet.": "unet",
    "text_encoder.": "text", "text_encoder_2.": "text_2", "base_model.model.": "unet",
}  # fmt: skip
_LDM_BLOCK = re.compile(r"(input_blocks_\d+_\d+|middle_block_\d+|output_blocks_\d+_\d+)_(.+)")
# LDM's module names inside a resnet have dots, which kohya turned into underscores.
_LDM_INNER = re.compile(r"(in_layers|emb_layers|out_layers)_(\d)")

Change = dict[str, Tensor]
"""`down`, `up` and perhaps `alpha` of one layer."""


def merge_loras(unet: nn.Module, texts: Sequence[nn.Module], specs: Sequence[str]) -> None:
    """Adds each LoRA (`path` or `path:weight`) to U-Net and text encoders. Raises `UsageError` if one does not fit."""
    if not specs:
        return
    networks = {"unet": unet, **dict(zip(("text", "text_2"), texts, strict=False))}
    layers = {
        (network, _flat(name)): module
        for network, root in networks.items()
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    for spec in specs:
        path, weight = split_weight(spec)
        _merge(layers, read_changes(path), weight, path)


def read_changes(path: Path) -> dict[tuple[str, str], Change]:
    """A LoRA file's changes by (network, layer). Raises `UsageError`."""
    if not path.is_file():
        raise UsageError(f"model.loras: no file {path}")
    changes: dict[tuple[str, str], Change] = {}
    for name, value in read_state(path).items():
        for mark, kind in _OTHERS.items():
            if mark in name:
                raise UsageError(f"model.loras: {path}: {kind} is not supported, only plain LoRA")
        place, part = _split(name, path)
        changes.setdefault(place, {})[part] = value
    for (network, layer), change in changes.items():
        if not {"down", "up"} <= change.keys():
            raise UsageError(f"model.loras: {path}: {network} {layer} is incomplete; is this a LoRA?")
    if not changes:
        raise UsageError(f"model.loras: {path}: holds no tensors")
    return changes


def _split(name: str, path: Path) -> tuple[tuple[str, str], str]:
    if name.endswith(".alpha"):
        layer, part = name.removesuffix(".alpha"), "alpha"
        # As old diffusers writes it: `...to_q.lora.alpha`, also behind the processor's name
        layer = layer.removesuffix(".lora").removesuffix(".lora_linear_layer")
    elif match := _PROCESSOR.fullmatch(name):
        layer, part = f"{match[1]}.{match[2]}" + (".0" if match[2] == "to_out" else ""), match[3]
    elif match := _SUFFIX.fullmatch(name):
        layer, part = match[1], _PARTS[match[2]]
    else:
        raise UsageError(f"model.loras: {path}: '{name}' is no LoRA's tensor; is this a LoRA?")
    for prefix, network in _PREFIXES.items():
        if layer.startswith(prefix):
            return (network, _flat(_modern(layer[len(prefix) :]))), part
    return ("unet", _flat(layer)), part


def _flat(name: str) -> str:
    return name.replace(".", "_").removeprefix("text_model_")


def _modern(layer: str) -> str:
    """kohya's `input_blocks_4_1_...` under diffusers' block names; other names as they are."""
    match = _LDM_BLOCK.fullmatch(layer)
    if match is None:
        return layer
    inner = _LDM_INNER.sub(r"\1.\2", match[2])
    return unet_name(re.sub(r"_(?=\d)", ".", match[1]) + "." + inner)


def _merge(
    layers: Mapping[tuple[str, str], nn.Module], changes: Mapping[tuple[str, str], Change], weight: float, path: Path
) -> None:
    _check_family(layers, changes, path)
    strange = [f"{network} {layer}" for network, layer in changes if (network, layer) not in layers]
    if strange:
        raise UsageError(
            f"model.loras: {path}: {len(strange)} of its {len(changes)} layers are not in this checkpoint, "
            f"first '{strange[0]}'; made for another family?"
        )
    for place, change in changes.items():
        parameter = layers[place].weight
        assert isinstance(parameter, nn.Parameter)
        down, up = (change[part].to(parameter.device, torch.float32).flatten(1) for part in ("down", "up"))
        scale = float(change["alpha"]) / len(down) if "alpha" in change else 1.0
        if up.shape[1] != down.shape[0] or len(up) * down.shape[1] != parameter.numel():
            shapes = f"{list(change['up'].shape)} times {list(change['down'].shape)}"
            raise UsageError(
                f"model.loras: {path}: {' '.join(place)} changes a weight of {list(parameter.shape)} by {shapes}"
            )
        changed = parameter.data.float() + (weight * scale * (up @ down)).view(parameter.shape)
        layout = torch.channels_last if changed.ndim == 4 else torch.contiguous_format
        parameter.data = changed.to(parameter.dtype, memory_format=layout)


def _check_family(
    layers: Mapping[tuple[str, str], nn.Module], changes: Mapping[tuple[str, str], Change], path: Path
) -> None:
    """The width of cross-attention tells a wrong family better than the first layer that does not fit."""
    widths = [
        v.in_features for (_, layer), v in layers.items() if layer.endswith("attn2_to_k") and isinstance(v, nn.Linear)
    ]
    theirs = [c["down"].shape[1] for (_, layer), c in changes.items() if layer.endswith("attn2_to_k")]
    if widths and theirs and widths[0] != theirs[0]:
        made, here = (BY_CONTEXT[n].name if n in BY_CONTEXT else "another model" for n in (theirs[0], widths[0]))
        raise UsageError(
            f"model.loras: {path}: made for {made} (cross-attention {theirs[0]}), this checkpoint is {here} "
            f"({widths[0]})"
        )
