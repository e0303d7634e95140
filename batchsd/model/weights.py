"""Weights from files into a module: memory-mapped, without a second copy, and strict both ways.

A tensor that is missing, left over or of another shape is an error that names it: half a network draws pictures
too, only wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from batchsd.model.pickles import read_pickle
from batchsd.types import UsageError

State = Mapping[str, Tensor]

PICKLES = (".bin", ".ckpt", ".pt", ".pth")

# diffusers before 0.15 named the VAE's attention so.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file. Raises `UsageError`."""
    if path.is_file() and not path.stat().st_size:
        raise UsageError(f"{path}: empty (zero bytes); download it again")
    if path.suffix in PICKLES:
        return read_pickle(path)
    if path.suffix not in ("", ".safetensors"):  # the hub's cache holds links to files without a suffix
        raise UsageError(f"{path}: not a checkpoint's file; .safetensors, {', '.join(PICKLES)} are read")
    return read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file: views of the mapped file, read from disk when they are looked at. Raises `UsageError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise UsageError(f"{path}: missing; a checkpoint folder in diffusers layout has it")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        with path.open("rb") as stream:
            start = stream.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise UsageError(f"{path}: not the weights but a Git LFS pointer to them; run `git lfs pull`") from None
        if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
            raise UsageError(f"{path}: not readable as safetensors, it is a text file; download it again") from None
        raise UsageError(f"{path}: not readable as safetensors ({error}); is the download complete?") from None


def metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header, such as `modelspec.prediction_type`; empty for other files."""
    from safetensors import safe_open

    if path.suffix in PICKLES:
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def modern_names(state: State) -> dict[str, Tensor]:
    """The VAE's state under today's names and shapes, whatever version of diffusers wrote it."""
    renamed = {".".join(_OLD_NAMES.get(part, part) for part in name.split(".")): v for name, v in state.items()}
    return {name: squeezed(v) if ".attentions." in name else v for name, v in renamed.items()}


def squeezed(value: Tensor) -> Tensor:
    """A 1x1 convolution's weight as a linear layer's."""
    return value[:, :, 0, 0] if value.ndim == 4 else value


def differences(module: nn.Module, state: State) -> list[str]:
    """What keeps `state` from being this module's, a line each: missing, unused, of another shape."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state]
    unused = [name for name in state if name not in wanted]
    found = []
    for kind, names in (("missing", missing), ("unused", unused)):
        if names:
            plural = "tensor" if len(names) == 1 else "tensors"
            found.append(f"{len(names)} {plural} {kind}, first '{names[0]}'")
    for name, value in wanted.items():
        if name in state and value.shape != state[name].shape:
            found.append(f"'{name}' has shape {list(state[name].shape)}, the config asks for {list(value.shape)}")
    return found


def check(module: nn.Module, state: State, where: str) -> None:
    """Raises `UsageError` naming the first tensor that is missing, unused or of another shape."""
    wrong = differences(module, state)
    if wrong:
        raise UsageError(f"{where}: {wrong[0]}")


def fill(module: nn.Module, state: State, where: str) -> None:
    """Puts `state` into a module made on the meta device, the tensors themselves, not copies.

    Raises `UsageError` naming the first tensor that is missing, unused or of another shape.
    """
    check(module, state, where)
    module.load_state_dict(state, assign=True)


def on_meta(build: type[nn.Module], config: object) -> nn.Module:
    """A module with shapes but no memory."""
    with torch.device("meta"):
        return build(config)
