"""The one door to transformers' CLIP: texts -> token ids -> states (B T D) that the U-Net attends to.

As diffusers does it: padded and cut to the tokenizer's length, no attention mask (unless the config asks for
one). SD1 and SD2 take the last hidden state after the final LayerNorm; SDXL the one before it, without that norm.
Clip skip counts as in diffusers (0 none, 1 the layer before; A1111's 2 is our 1) and holds for every prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchsd.model.parts import TextParts
from batchsd.model.weights import State, fill
from batchsd.types import UsageError


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text model with its tokenizer. `length` is T, 77 for Stable Diffusion.

    `skip` layers are left out at the end; `normed` says whether the final LayerNorm follows. `words` are what
    textual inversion made of several tokens each.
    """

    model: Any
    tokenizer: Any
    skip: int = 0
    normed: bool = True
    words: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return int(self.tokenizer.model_max_length)

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T), padded to `length` and cut there."""
        return self.tokenizer(
            [self.spelled(text) for text in texts],
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def spelled(self, text: str) -> str:
        """The text with each learnt word of several tokens written out."""
        for word, tokens in self.words.items():
            text = re.sub(rf"{re.escape(word)}(?!_\d)", tokens, text)
        return text

    def tokens_cut(self, text: str) -> int:
        """How many of the text's tokens do not fit and are not seen by the model."""
        # verbose=False: transformers otherwise warns about every long text.
        found = self.tokenizer(self.spelled(text), truncation=False, verbose=False).input_ids
        return max(0, len(found) - self.length)

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Ids (B, T) -> states (B, T, D) on the model's device; differentiable."""
        return self._states(self._run(ids_BT))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Texts -> states (B, T, D)."""
        return self(self.ids(texts))

    @torch.no_grad()
    def encode_pooled(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Texts -> states (B, T, D), and what the end mark becomes (B, P) where the encoder projects it."""
        return self.states_and_pooled(self.ids(texts))

    def states_and_pooled(self, ids_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ids (B, T) -> states (B, T, D), and what the end mark becomes (B, P) where the encoder projects it."""
        found = self._run(ids_BT)
        return self._states(found), getattr(found, "text_embeds", None)

    def _run(self, ids_BT: Tensor) -> Any:
        ids_BT = ids_BT.to(next(self.model.parameters()).device)
        mask_BT = None
        if getattr(self.model.config, "use_attention_mask", False):
            mask_BT = (ids_BT != self.tokenizer.pad_token_id).long()
        plain = self.normed and not self.skip
        return self.model(ids_BT, attention_mask=mask_BT, output_hidden_states=not plain)

    def _states(self, found: Any) -> Tensor:
        if self.normed and not self.skip:
            return found.last_hidden_state
        hidden_BTD = found.hidden_states[-1 - self.skip]
        return _part(self.model, "final_layer_norm")(hidden_BTD) if self.normed else hidden_BTD

    @property
    def embedding(self) -> nn.Embedding:
        """The table of the tokens' vectors."""
        return _part(self.model, "token_embedding")


def build_text_encoder(parts: TextParts, skip: int = 0, normed: bool = True, tokenizer: Any = None) -> TextEncoder:
    """The text encoder of these parts, on the CPU in the file's type; `tokenizer` instead of its own, where given.

    Raises `UsageError` where the parts do not fit each other, or hold other weights than the config says.
    """
    tokenizer = parts.tokenizer() if tokenizer is None else tokenizer
    model = text_network(parts.config)
    config = model.config
    if len(tokenizer) > config.vocab_size:
        raise UsageError(
            f"{parts.where}: the tokenizer knows {len(tokenizer)} tokens, the text encoder {config.vocab_size}"
        )
    if not 0 <= skip < config.num_hidden_layers:
        raise UsageError(f"model.clip_skip: {parts.where} has only {config.num_hidden_layers} layers")
    # Old configs say 2, upon which transformers takes the largest id for the end mark: wrong for learnt words.
    config.eos_token_id = tokenizer.eos_token_id
    # Filled by us, not by from_pretrained, which replaces what does not fit by random numbers and goes on.
    fill(model, known_names(parts.state, model), parts.where)
    positions = torch.arange(config.max_position_embeddings)[None]
    for name, _ in list(model.named_buffers()):  # they are in no file: one, the numbers of the positions
        model.get_submodule(name.rpartition(".")[0]).register_buffer("position_ids", positions, persistent=False)
    return TextEncoder(model, tokenizer, skip, normed)


def text_network(config: Mapping[str, Any]) -> Any:
    """transformers' CLIP text model of that config on the meta device, with its projection where that is asked for."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    projected = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
    with torch.device("meta"):
        known = CLIPTextConfig.from_dict(dict(config))
        return CLIPTextModelWithProjection(known) if projected else CLIPTextModel(known)


def known_names(state: State, model: nn.Module) -> dict[str, Tensor]:
    """The state without old files' position numbers, and with or without `text_model.`, as this transformers has it."""
    wanted = set(model.state_dict())
    prefix = "text_model." if any(name.startswith("text_model.") for name in wanted) else ""
    found = {}
    for name, value in state.items():
        short = name.removeprefix("text_model.")
        if not short.endswith("position_ids"):
            found[short if short in wanted else prefix + short] = value
    return found


def _part(model: nn.Module, name: str) -> Any:
    return next(part for where, part in model.named_modules() if where.rpartition(".")[2] == name)
