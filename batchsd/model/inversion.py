"""Textual inversion (Gal et al. 2022): learnt vectors for a new word, put behind the vocabulary when a model is loaded.

A word of n vectors becomes n tokens, `word`, `word_1`, ...; a prompt says `word`. The word is the file's own key in
diffusers' files, and the file's name in A1111's and SDXL's, as people write it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchsd.model.pickles import read_object
from batchsd.model.text import TextEncoder
from batchsd.model.weights import PICKLES, read_safetensors
from batchsd.types import UsageError

_ENCODERS = ("clip_l", "clip_g")  # SDXL's files name the encoder


def learn_words(encoders: Sequence[TextEncoder], files: Sequence[str]) -> None:
    """Teaches each file's word to every encoder. Raises `UsageError` where a file is none or does not fit."""
    for name in files:
        word, vectors = read_word(Path(name))
        if len(vectors) != len(encoders):
            raise UsageError(
                f"model.embeddings: {name}: for {len(vectors)} text encoder(s), this checkpoint has {len(encoders)}"
            )
        for encoder, vectors_ND in zip(encoders, vectors, strict=True):
            _learn(encoder, word, vectors_ND, name)


def read_word(path: Path) -> tuple[str, list[Tensor]]:
    """(word, its vectors (N, D) for each text encoder). Raises `UsageError`."""
    if not path.is_file():
        raise UsageError(f"model.embeddings: no file {path}")
    found: Any = read_object(path) if path.suffix in PICKLES else read_safetensors(path)
    if not isinstance(found, dict):
        raise UsageError(f"model.embeddings: {path}: not a textual inversion")
    if all(name in found for name in _ENCODERS):
        return path.stem, [_rows(found[name]) for name in _ENCODERS]
    if isinstance(found.get("string_to_param"), dict) and found["string_to_param"]:
        return path.stem, [_rows(next(iter(found["string_to_param"].values())))]
    if isinstance(found.get("emb_params"), Tensor):
        return path.stem, [_rows(found["emb_params"])]
    tensors = {word: value for word, value in found.items() if isinstance(value, Tensor) and value.ndim <= 2}
    if len(tensors) != 1 or len(found) != 1:
        raise UsageError(f"model.embeddings: {path}: not a textual inversion (one tensor under one word is expected)")
    word, value = next(iter(tensors.items()))
    return word, [_rows(value)]


def _rows(value: Tensor) -> Tensor:
    return value.detach().reshape(-1, value.shape[-1])


def _learn(encoder: TextEncoder, word: str, vectors_ND: Tensor, where: str) -> None:
    table = encoder.embedding
    width = table.weight.shape[1]
    if vectors_ND.shape[1] != width:
        raise UsageError(
            f"model.embeddings: {where}: vectors of {vectors_ND.shape[1]} numbers, this text encoder has {width}; "
            "made for another family"
        )
    tokens = [word] + [f"{word}_{i}" for i in range(1, len(vectors_ND))]
    known = [token for token in tokens if token in encoder.tokenizer.get_vocab()]
    if known:
        raise UsageError(
            f"model.embeddings: {where}: the word '{known[0]}' is already in the vocabulary; rename the file"
        )
    encoder.tokenizer.add_tokens(tokens)
    first, rows = encoder.tokenizer.convert_tokens_to_ids(word), table.weight.shape[0]
    # The vocabulary may be shorter than the table: then the new rows stand inside it.
    grown = torch.cat([table.weight.data, table.weight.new_zeros(max(0, first + len(tokens) - rows), width)])
    grown[first : first + len(tokens)] = vectors_ND.to(grown)
    table.weight = nn.Parameter(grown, requires_grad=False)
    table.num_embeddings = len(grown)
    if len(tokens) > 1:
        encoder.words[word] = " ".join(tokens)
