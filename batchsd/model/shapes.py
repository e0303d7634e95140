"""The configs of networks, read from the shapes of their tensors (diffusers' names): for files that carry none.

What shapes do not tell comes from the family: heads, activation, scaling factor, scheduler.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from batchsd.model.weights import State


def unet_dict(state: State) -> dict[str, Any]:
    """diffusers' config keys for a U-Net, all but heads, upcasting and sample size."""
    levels = _count(state, r"down_blocks\.(\d+)\.")
    channels = [state[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
    attention = {way: [_has(state, f"{way}_blocks.{i}.attentions.") for i in range(levels)] for way in ("down", "up")}
    inner = [name for name in state if name.endswith("attn2.to_k.weight")]
    config: dict[str, Any] = {
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": state["conv_out.weight"].shape[0],
        "block_out_channels": channels,
        "layers_per_block": [_count(state, rf"down_blocks\.{i}\.resnets\.(\d+)\.") for i in range(levels)],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention["down"]],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in attention["up"]],
        "transformer_layers_per_block": [
            max(1, _count(state, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\."))
            for i in range(levels)
        ],
        "cross_attention_dim": state[inner[0]].shape[1] if inner else 0,
        "use_linear_projection": any(v.ndim == 2 for name, v in state.items() if name.endswith("proj_in.weight")),
    }
    middle = _count(state, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    config["transformer_layers_per_block"][-1] = max(config["transformer_layers_per_block"][-1], middle)
    if "add_embedding.linear_1.weight" in state:
        # 256 numbers for each of the six sizes, in every SDXL.
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config |= {**added, "projection_class_embeddings_input_dim": state["add_embedding.linear_1.weight"].shape[1]}
    if "time_embedding.cond_proj.weight" in state:
        config["time_cond_proj_dim"] = state["time_embedding.cond_proj.weight"].shape[1]
    return config


def vae_dict(state: State) -> dict[str, Any]:
    """diffusers' config keys for an autoencoder, all but its scaling factor."""
    levels = _count(state, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [
            state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)
        ],
        "layers_per_block": _count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "mid_block_add_attention": _has(state, "encoder.mid_block.attentions."),
    }


def text_dict(state: State) -> dict[str, Any]:
    """transformers' config keys for a CLIP text model, all but its activation. Heads are 64 wide in every CLIP."""
    short = {name.removeprefix("text_model."): value for name, value in state.items()}
    words = short["embeddings.token_embedding.weight"]
    config: dict[str, Any] = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "num_attention_heads": max(1, words.shape[1] // 64),
        "max_position_embeddings": short["embeddings.position_embedding.weight"].shape[0],
        "num_hidden_layers": _count(short, r"encoder\.layers\.(\d+)\."),
        "intermediate_size": short["encoder.layers.0.mlp.fc1.weight"].shape[0],
    }
    if "text_projection.weight" in short:
        config["projection_dim"] = short["text_projection.weight"].shape[0]
        config["architectures"] = ["CLIPTextModelWithProjection"]
    return config


def _count(state: Mapping[str, Any], pattern: str) -> int:
    """How many numbers 0, 1, ... stand at the group of `pattern` in the names."""
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)


def _has(state: Mapping[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)
