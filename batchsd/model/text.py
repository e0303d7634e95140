"""The one door to transformers' CLIP: texts -> token ids -> states (B T D) that the U-Net attends to.

As diffusers does it: padded and cut to the tokenizer's length, no attention mask (unless the config asks for
one), the last hidden state after the final LayerNorm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchsd.model.config import read_json
from batchsd.model.weights import fill, read_safetensors
from batchsd.types import UsageError


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text model with its tokenizer. `length` is T, 77 for Stable Diffusion."""

    model: Any
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
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = load_tokenizer(folder / "tokenizer")
    where = folder / "text_encoder"
    config = CLIPTextConfig.from_dict(read_json(where / "config.json"))
    if len(tokenizer) > config.vocab_size:
        raise UsageError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens, the text encoder {config.vocab_size}"
        )
    # Filled by us, not by from_pretrained, which replaces what does not fit by random numbers and goes on.
    with torch.device("meta"):
        model = CLIPTextModel(config)
    fill(model, _known_names(read_safetensors(where / "model.safetensors"), model), str(where))
    positions = torch.arange(config.max_position_embeddings)[None]
    for name, _ in list(model.named_buffers()):  # they are in no file: one, the numbers of the positions
        model.get_submodule(name.rpartition(".")[0]).register_buffer("position_ids", positions, persistent=False)
    nn.Module.to(model, device, dtype)
    return TextEncoder(model.eval().requires_grad_(False), tokenizer)


def _known_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state without old files' position numbers, and with or without `text_model.`, as this transformers has it."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    short = {name.removeprefix("text_model."): value for name, value in state.items()}
    return {prefix + name: value for name, value in short.items() if not name.endswith("position_ids")}


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
