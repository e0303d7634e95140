"""Tensor names of LDM's single files -> diffusers' and transformers' names; the transformers' insides are the same.

    input_blocks.i    -> down_blocks.((i-1) // 3), layer (i-1) % 3;  .0 resnet, .1 attention, .0.op downsampler
    output_blocks.i   -> up_blocks.(i // 3), layer i % 3;            .0 resnet, .1 attention, last .conv upsampler
    decoder.up.i      -> decoder.up_blocks.(n-1-i), counted from the other end

From CompVis/stable-diffusion, Stability-AI/stablediffusion and generative-models (their `openaimodel.py`,
`model.py`) and open_clip's `transformer.py`.
"""

from __future__ import annotations

import re

from torch import Tensor

from batchsd.model.weights import State, squeezed

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_HEADS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_VAE_PARTS = {
    "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1", "mid.attn_1": "mid_block.attentions.0",
    "norm_out": "conv_norm_out", "nin_shortcut": "conv_shortcut",
}  # fmt: skip
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPENCLIP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPENCLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip


def unet_state(state: State) -> dict[str, Tensor]:
    """A U-Net's tensors, the prefix `model.diffusion_model.` already gone, under diffusers' names."""
    return {unet_name(name): value for name, value in state.items()}


def unet_name(name: str) -> str:
    """One U-Net name, of a tensor or of a module; a name that LDM does not have comes back as it is."""
    for ours, theirs in _HEADS.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    kind, _, rest = name.partition(".")
    if kind == "middle_block":
        part, _, inner = rest.partition(".")
        return _joined("mid_block", _MIDDLE[part], _resnet_name(inner))
    if kind not in ("input_blocks", "output_blocks"):
        return name
    number, part, inner = rest.split(".", 2)
    if kind == "input_blocks" and number == "0":
        return _joined("conv_in", inner)
    level, layer = divmod(int(number) - (kind == "input_blocks"), 3)
    block = f"{'down' if kind == 'input_blocks' else 'up'}_blocks.{level}"
    if inner == "op" or inner.startswith("op."):
        return _joined(block, "downsamplers.0.conv", inner[3:])
    if inner == "conv" or inner.startswith("conv."):
        return _joined(block, "upsamplers.0.conv", inner[5:])
    if part == "0":
        return _joined(block, f"resnets.{layer}", _resnet_name(inner))
    return _joined(block, f"attentions.{layer}", inner)


def _resnet_name(name: str) -> str:
    for ours, theirs in _RESNET.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    return name


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def vae_state(state: State) -> dict[str, Tensor]:
    """An autoencoder's tensors, `first_stage_model.` already gone; its 1x1 attention convolutions become layers."""
    levels = 1 + max((int(m[1]) for name in state if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    found = {}
    for name, value in state.items():
        renamed = _vae_name(name, levels)
        found[renamed] = squeezed(value) if ".attentions." in renamed else value
    return found


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", name)
    name = re.sub(r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", name)
    if match := re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.", name):
        part = "resnets." if match[2] == "block" else "upsamplers.0."
        name = f"decoder.up_blocks.{levels - 1 - int(match[1])}.{part}{name[match.end() :]}"
    for ours, theirs in _VAE_PARTS.items():
        name = re.sub(rf"(?<=\.){re.escape(ours)}(?=\.)", theirs, name)
    before, mark, inner = name.partition("mid_block.attentions.0.")
    if mark:
        layer, _, kind = inner.partition(".")
        name = f"{before}{mark}{_VAE_ATTENTION.get(layer, layer)}.{kind}"
    return name


def openclip_state(state: State, projection: bool) -> dict[str, Tensor]:
    """An OpenCLIP text tower under transformers' names: q, k, v are cut out of one matrix, the projection turned.

    Without `projection` (SD2, which never uses it) that tensor is left out; so is the temperature.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _OPENCLIP:
            found[_OPENCLIP[name]] = value
        elif name == "text_projection" and projection:
            found["text_projection.weight"] = value.T
        elif match := re.match(r"transformer\.resblocks\.(\d+)\.(.+)", name):
            found |= _openclip_layer(f"text_model.encoder.layers.{match[1]}", match[2], value)
        elif name not in ("text_projection", "logit_scale", "attn_mask"):
            found[name] = value
    return found


def _openclip_layer(layer: str, name: str, value: Tensor) -> dict[str, Tensor]:
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.rpartition("_")[2]
        thirds = zip("qkv", value.chunk(3), strict=True)
        return {f"{layer}.self_attn.{letter}_proj.{kind}": third for letter, third in thirds}
    part, _, kind = name.rpartition(".")
    return {f"{layer}.{_OPENCLIP_LAYER.get(part, part)}.{kind}": value}
