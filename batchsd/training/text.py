"""The text encoder's head start: tell a picture's attributes from its caption, before any picture is drawn.

A linear head per attribute (colour of the first body, floor, ...) reads the state of the end-of-text token;
cross-entropy, summed. A minute of this spares the U-Net from teaching grammar through noise. Needs the
`attributes` column; without it the stage is left out and text is learnt with the U-Net alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchsd.model.text import TextEncoder
from batchsd.model.tokenizer import load_tokenizer
from batchsd.training.data import Pictures
from batchsd.training.loop import Loss


def new_text_encoder(
    tokenizer_folder: Path, width: int, layers: int, heads: int, context_dim: int | None = None
) -> TextEncoder:
    """A randomly initialised CLIP text model for the tokenizer in `tokenizer_folder`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = load_tokenizer(tokenizer_folder)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextEncoder(CLIPTextModel(config), tokenizer)


class Heads(nn.Module):
    """A text model with one linear head an attribute; only the text model is kept afterwards."""

    def __init__(self, text: nn.Module, labels: Mapping[str, Sequence[str]], width: int) -> None:
        super().__init__()
        self.text = text
        self.heads = nn.ModuleDict({_module_name(name): nn.Linear(width, len(v)) for name, v in labels.items()})


def attribute_labels(attributes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Every attribute's name with the sorted list of its values; "" stands for a picture without it."""
    flat = [flatten(each) for each in attributes]
    names = sorted({name for each in flat for name in each})
    labels = {name: sorted({each.get(name, "") for each in flat}) for name in names}
    # More values than that are measures (a position, an angle), not names that a caption could tell.
    return {name: values for name, values in labels.items() if 1 < len(values) <= 64}


def flatten(attributes: Any, prefix: str = "") -> dict[str, str]:
    """{"bodies": [{"colour": "red"}]} -> {"bodies.0.colour": "red"}."""
    if isinstance(attributes, Mapping):
        pairs = [(str(name), value) for name, value in attributes.items()]
    elif isinstance(attributes, (list, tuple)):
        pairs = [(str(i), value) for i, value in enumerate(attributes)]
    else:
        return {prefix[:-1]: "" if attributes is None else str(attributes)}
    found: dict[str, str] = {}
    for name, value in pairs:
        found.update(flatten(value, f"{prefix}{name}."))
    return found


def attribute_loss(encoder: TextEncoder, heads: Heads, pictures: Pictures, batch_size: int) -> Loss:
    """Cross-entropy of every attribute from the caption alone."""
    assert pictures.attributes is not None
    labels = attribute_labels(pictures.attributes)
    flat = [flatten(each) for each in pictures.attributes]
    targets = {n: torch.tensor([v.index(each.get(n, "")) for each in flat]) for n, v in labels.items()}
    ids_NT = encoder.ids(pictures.captions)
    # The end-of-text token's place: padding has the same id, so it is the first of them.
    ends_N = (ids_NT == encoder.tokenizer.eos_token_id).int().argmax(dim=1)

    def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        index = torch.randint(len(pictures), (batch_size,), generator=generator)
        state_BD = encoder(ids_NT[index])[torch.arange(batch_size), ends_N[index]]
        logits = {name: heads.heads[_module_name(name)](state_BD) for name in labels}
        terms = [F.cross_entropy(logits[name], targets[name][index]) for name in labels]
        right = torch.stack([(logits[n].argmax(-1) == targets[n][index]).float().mean() for n in labels])
        value = torch.stack(terms).sum()
        return value, {"loss": value.item(), "right": right.mean().item()}

    return loss


def _module_name(attribute: str) -> str:
    return attribute.replace(".", "_")  # torch takes dots for levels
