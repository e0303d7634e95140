"""The depth network inside SD2-depth's single file: MiDaS' names (`depth_model.model.`) -> transformers' DPT.

It is MiDaS' dpt_hybrid: a ResNet's features as the patches of a ViT, four stages of which are fused into a map.
From isl-org/MiDaS (`midas/dpt_depth.py`, `blocks.py`) and timm's vit_base_resnet50_384.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from batchsd.model.weights import State

CONFIG: Mapping[str, Any] = {
    "architectures": ["DPTForDepthEstimation"], "is_hybrid": True, "image_size": 384, "readout_type": "project",
    "backbone_out_indices": [2, 5, 8, 11], "backbone_featmap_shape": [1, 1024, 24, 24], "neck_ignore_stages": [0, 1],
    "neck_hidden_sizes": [256, 512, 768, 768], "reassemble_factors": [1, 1, 1, 0.5],
    # timm's; the hub's folder says 1e-12, which no number of the network can tell from it.
    "layer_norm_eps": 1e-6,
}  # fmt: skip
"""transformers' config keys for it; the others have that class's defaults."""

# In this order: the first that fits is the name's. N counts from 0 there, from 1 or from the other end here.
_PATTERNS = (
    (r"pretrained\.model\.cls_token", "dpt.embeddings.cls_token"),
    (r"pretrained\.model\.pos_embed", "dpt.embeddings.position_embeddings"),
    (r"pretrained\.model\.patch_embed\.proj\.", "dpt.embeddings.projection."),
    (r"pretrained\.model\.patch_embed\.backbone\.stem\.conv\.", "dpt.embeddings.backbone.bit.embedder.convolution."),
    (r"pretrained\.model\.patch_embed\.backbone\.stem\.norm\.", "dpt.embeddings.backbone.bit.embedder.norm."),
    (r"pretrained\.model\.patch_embed\.backbone\.stages\.(\d+)\.blocks\.",
     r"dpt.embeddings.backbone.bit.encoder.stages.\1.layers."),
    (r"pretrained\.model\.blocks\.", "dpt.encoder.layer."),
    (r"pretrained\.model\.norm\.", "dpt.layernorm."),
    (r"pretrained\.act_postprocess(\d)\.0\.project\.", "neck.reassemble_stage.readout_projects.{below}."),
    (r"pretrained\.act_postprocess(\d)\.3\.", "neck.reassemble_stage.layers.{below}.projection."),
    (r"pretrained\.act_postprocess(\d)\.4\.", "neck.reassemble_stage.layers.{below}.resize."),
    (r"scratch\.layer(\d)_rn\.", "neck.convs.{below}."),
    (r"scratch\.refinenet(\d)\.", "neck.fusion_stage.layers.{turned}."),
    (r"scratch\.output_conv\.", "head.head."),
)  # fmt: skip
_VIT = {
    "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    "norm1": "layernorm_before", "norm2": "layernorm_after",
}  # fmt: skip
_FUSION = {
    "out_conv": "projection", "resConfUnit1": "residual_layer1", "resConfUnit2": "residual_layer2",
    "conv1": "convolution1", "conv2": "convolution2",
}  # fmt: skip
_CLASSIFIER = "pretrained.model.head."  # ImageNet's, which MiDaS carries along


def depth_state(state: State) -> dict[str, Tensor]:
    """The depth network's tensors, `depth_model.model.` already gone, under transformers' names; q, k, v cut apart."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(_CLASSIFIER):
            continue
        renamed = _depth_name(name)
        layer, mark, kind = renamed.partition(".attn.qkv.")
        if not mark:
            found[renamed] = value
            continue
        for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
            found[f"{layer}.attention.attention.{part}.{kind}"] = third
    return found


def _depth_name(name: str) -> str:
    for pattern, theirs in _PATTERNS:
        if match := re.match(pattern, name):
            number = int(match[1]) if match.groups() else 0
            start = match.expand(theirs).format(below=number - 1, turned=4 - number)
            inside = _VIT if theirs == "dpt.encoder.layer." else _FUSION if "fusion" in theirs else {}
            return start + _inner(name[match.end() :], inside)
    return name


def _inner(name: str, parts: Mapping[str, str]) -> str:
    for ours, theirs in parts.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\1{theirs}.", name)
    return name
