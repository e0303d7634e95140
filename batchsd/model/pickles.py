"""Weights in torch's pickle format, which can hold code: read as data only, refused where they want more.

Training frameworks leave objects of their own beside the weights of old .ckpt files; those classes are replaced
by an empty one, so that nothing of them is imported or run.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchsd.types import UsageError

# Callbacks and the like that Lightning saved with SD 1.x and 2.x; nothing in them is weights.
_INERT = ("pytorch_lightning.", "lightning.")


class Inert:
    """Stands for an object of a training framework."""

    def __init__(self, *values: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin, .ckpt, .pt or .pth file, out of a nested `state_dict`. Raises `UsageError`."""
    found = read_object(path)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise UsageError(f"{path}: holds a {type(found).__name__}, not weights by name")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def read_object(path: Path) -> Any:
    """What a pickle holds: tensors, numbers, texts, lists and tables. Raises `UsageError` if it wants to run code."""
    if not path.exists():
        raise UsageError(f"{path}: missing")
    mapped = zipfile.is_zipfile(path)  # the older format cannot be mapped
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else []
        inert: list[Any] = [(Inert, name) for name in names if name.startswith(_INERT)]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UsageError(f"{path}: {_refusal(str(error))}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path}: not readable as weights ({first}); is the download complete?") from None


def _refusal(message: str) -> str:
    """Which thing the file wanted, from torch's long advice."""
    for mark in ("Unsupported global: GLOBAL ", "unsupported GLOBAL ", "Unsupported class "):
        if mark in message:
            name = message.split(mark)[1].split()[0]
            return f"refused, this pickle wants to run code ({name}); take the model's .safetensors file"
    return "not readable as weights, or a pickle that wants to run code; take the model's .safetensors file"
