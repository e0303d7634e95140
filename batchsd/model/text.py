"""The one door to transformers' CLIP: texts -> token ids -> states (B T D) that the U-Net attends to.

As diffusers does it: padded and cut to the tokenizer's length, no attention mask (unless the config asks for
one), the last hidden state after the final LayerNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchsd.types import UsageError


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text model with its tokenizer. `length` is T, 77 for Stable Diffusion."""

    model: nn.Module
    tokenizer: Any

    @property
    def length(self) -> int:
        return int(self.tokenizer.model_max_length)

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T), padded to `length` and cut there."""
        return self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids

    def tokens_cut(self, text: str) -> int:
        """How many of the text's tokens do not fit and are not seen by the model."""
        # verbose=False: transformers otherwise warns about every long text.
        found = self.tokenizer(text, truncation=False, verbose=False).input_ids
        return max(0, len(found) - self.length)

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Ids (B, T) -> states (B, T, D) on the model's device; differentiable."""
        ids_BT = ids_BT.to(next(self.model.parameters()).device)
        mask_BT = None
        if getattr(self.model.config, "use_attention_mask", False):
            mask_BT = (ids_BT != self.tokenizer.pad_token_id).long()
        return self.model(ids_BT, attention_mask=mask_BT).last_hidden_state

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Texts -> states (B, T, D)."""
        return self(self.ids(texts))


def load_text_encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> TextEncoder:
    """The text encoder of a diffusers-layout folder (`text_encoder/` and `tokenizer/`), nothing downloaded.

    Raises `UsageError` where files are missing, do not fit each other, or hold other weights than the config says.
    """
    from transformers import CLIPTextModel

    tokenizer = load_tokenizer(folder / "tokenizer")
    where = folder / "text_encoder"
    try:
        model, info = CLIPTextModel.from_pretrained(
            where, local_files_only=True, output_loading_info=True, dtype=dtype, use_safetensors=True
        )
    except Exception as error:  # transformers raises many kinds; each means that the folder is no good
        raise UsageError(f"{where}: not loadable as a CLIP text encoder ({_first_line(error)})") from None
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(name) for name in info.get(kind, ()) if "position_ids" not in str(name))
        if names:
            what = kind.replace("_keys", "")
            raise UsageError(f"{where}: {len(names)} tensors {what}, first '{names[0]}'")
    if len(tokenizer) > model.config.vocab_size:
        raise UsageError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens, the text encoder {model.config.vocab_size}"
        )
    return TextEncoder(model.to(device).eval().requires_grad_(False), tokenizer)


def load_tokenizer(folder: Path) -> Any:
    """transformers' CLIPTokenizer from its files. Raises `UsageError` where they are missing or broken."""
    from transformers import CLIPTokenizer

    if not folder.is_dir():
        raise UsageError(f"{folder}: missing; a checkpoint folder in diffusers layout has it")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UsageError(f"{folder}: not loadable as a CLIP tokenizer ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
