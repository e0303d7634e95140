"""What a job adds to a checkpoint: another VAE or tokenizer, LoRAs, learnt words. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def split_weight(spec: str) -> tuple[Path, float]:
    """`a.safetensors:0.8` -> (path, 0.8); without a number, 1."""
    before, _, last = spec.rpartition(":")
    try:
        return Path(before or spec), float(last) if before else 1.0
    except ValueError:
        return Path(spec), 1.0


def extra_files(vae: str, loras: Sequence[str], embeddings: Sequence[str], tokenizer: str) -> list[tuple[str, Path]]:
    """Every extra file with what it is used for, in words that two uses with the same pictures share."""
    weighted = [split_weight(spec) for spec in loras]
    return [
        *([("vae", Path(vae))] if vae else []),
        *((f"lora {weight:g}", path) for path, weight in weighted),
        *((f"embedding {Path(name).stem}", Path(name)) for name in embeddings),
        *([("tokenizer", Path(tokenizer))] if tokenizer else []),
    ]
