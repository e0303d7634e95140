"""What a checkpoint is, without loading it: the names, types and shapes of its tensors against its networks'.

Tensors are views of mapped files, and networks lie on the meta device; of the weights themselves only the one
tensor that tells noise from velocity is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from batchsd.model.checkpoint import needs_vae, networks, read_parts
from batchsd.model.text import known_names, text_network
from batchsd.model.weights import State, check, differences


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Family, reasons, native size in pixels, scheduler, and each network's facts. Raises `UsageError`."""
    parts = read_parts(path)
    unet, vae = networks(parts)
    found = {"unet": network_facts(unet, parts.unet)}
    missing = {**weight_facts({}), "problems": ["none in it; name one as model.vae"]}
    found["vae"] = network_facts(vae, parts.vae) if parts.vae else missing
    for i, text in enumerate(parts.texts):
        model = text_network(text.config)
        found["text_encoder" + ("_2" if i else "")] = network_facts(model, known_names(text.state, model))
    if parts.depth:
        found["depth_estimator"] = weight_facts(parts.depth.state)
    return {
        "where": parts.where,
        "family": parts.family,
        "reasons": list(parts.reasons),
        "native_size": unet.config.sample_size * vae.config.factor,
        "latent_size": unet.config.sample_size,
        "extra_channels": unet.config.in_channels - vae.config.latent_channels,
        "context_dim": unet.config.context_dim,
        "channels": list(unet.config.channels),
        "scaling_factor": vae.config.scaling_factor,
        "prediction_type": parts.scheduler.get("prediction_type", "epsilon"),
        "scheduler": parts.scheduler.get("_class_name", ""),
        "networks": found,
    }


def recognised(path: Path, vae: str = "", ema: bool = False) -> tuple[str, ...]:
    """What was recognised and why, a line each, from the headers of the files: quick, before anything loads.

    Raises `UsageError` where U-Net or VAE are not whole, of another kind, or broken.
    """
    parts = read_parts(path, vae, ema)
    needs_vae(parts)
    for name, network, state in zip(("unet", "vae"), networks(parts), (parts.unet, parts.vae), strict=True):
        check(network, state, f"{parts.where}: {name}")
    return parts.reasons


def network_facts(network: nn.Module, state: State) -> dict[str, Any]:
    """Parameters, bytes, types, and what is missing, unused or of another shape."""
    return weight_facts(state) | {"problems": differences(network, state)}


def weight_facts(state: State) -> dict[str, Any]:
    """Parameters, bytes and types, of tensors that nothing is compared to."""
    return {
        "tensors": len(state),
        "parameters": sum(value.numel() for value in state.values()),
        "bytes": sum(value.nbytes for value in state.values()),
        "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in state.values()}),
        "problems": [],
    }


def describe(facts: Mapping[str, Any]) -> list[str]:
    """The facts as lines for people."""
    side, latents, more = facts["native_size"], facts["latent_size"], facts["extra_channels"]
    lines = [
        *facts["reasons"],
        f"native size {side} x {side} pixels: latents of {latents} x {latents}, scaled by {facts['scaling_factor']}",
        f"U-Net of {', '.join(map(str, facts['channels']))} channels, told texts of width {facts['context_dim']}"
        + (f"; {more} input channel{'s' * (more > 1)} beside the latents" if more else ""),
    ]
    for name, network in facts["networks"].items():
        types, size = ", ".join(network["dtypes"]), f"{network['bytes'] / 1e6:,.1f} MB"
        count = f"{network['parameters']:,} parameters in {network['tensors']:,} tensors"
        lines += [f"{name}: {count}, {types}, {size}"] if network["tensors"] else []
        lines += [f"{name}: {problem}" for problem in network["problems"]]
    whole = not any(network["problems"] for network in facts["networks"].values())
    return [*lines, "nothing missing, nothing unused" if whole else "not drawable as it is"]
