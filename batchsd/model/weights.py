"""Weights from safetensors into a module: memory-mapped, without a second copy, and strict both ways.

A tensor that is missing, left over or of another shape is an error that names it: half a network draws pictures
too, only wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from batchsd.types import UsageError

# diffusers before 0.15 named the VAE's attention so.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; on a CPU they are views of the mapped file. Raises `UsageError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise UsageError(f"{path}: missing; a checkpoint folder in diffusers layout has it")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: not readable as safetensors ({error}); is the download complete?") from None


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's state under today's names, whatever version of diffusers wrote it."""
    return {".".join(_OLD_NAMES.get(part, part) for part in name.split(".")): v for name, v in state.items()}


def fill(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Puts `state` into a module made on the meta device, the tensors themselves, not copies.

    Raises `UsageError` naming the first tensor that is missing, unused or of another shape.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state]
    unused = [name for name in state if name not in wanted]
    for kind, names in (("missing", missing), ("unused", unused)):
        if names:
            plural = "tensor" if len(names) == 1 else "tensors"
            raise UsageError(f"{where}: {len(names)} {plural} {kind}, first '{names[0]}'")
    for name, value in wanted.items():
        if value.shape != state[name].shape:
            raise UsageError(
                f"{where}: '{name}' has shape {list(state[name].shape)}, the config asks for {list(value.shape)}"
            )
    module.load_state_dict(state, assign=True)


def on_meta(build: type[nn.Module], config: object) -> nn.Module:
    """A module with shapes but no memory."""
    with torch.device("meta"):
        return build(config)
