"""Prompts beyond plain text: weights on words, and texts longer than the encoder reads at once.

    (word) 1.1, ((word)) 1.21, [word] 1/1.1, (word:1.4) 1.4, \\( a bracket, BREAK: what follows begins a new chunk
    tokens -> chunks of T - 2, each encoded alone -> z * w, brought back to the mean of z -> laid end to end

Syntax and numbers are AUTOMATIC1111's. Two things differ: the mean is each chunk's own, where there it is taken
over the whole batch of prompts; and a full chunk ends where it is full, not at the comma before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from batchsd.model.checkpoint import Model
    from batchsd.model.text import TextEncoder

STEP = 1.1  # of one pair of brackets

_TOKENS = re.compile(r"\\.|\(|\[|:\s*[+-]?\d*\.?\d+\s*\)|\)|\]|\bBREAK\b|[^\\()\[\]:B]+|.", re.DOTALL)

Piece = tuple[str, float]
"""A stretch of text and its weight."""

Segments = list[list[Piece]]
"""The text between BREAKs, each in pieces."""

Token = tuple[int, float]
"""A token's number and its weight."""

Encoded = tuple["Tensor", "Tensor | None"]
"""A text's states (T, D), and pooled (P,) where the model has such a thing."""


def plain(text: str) -> Segments:
    return [[(text, 1.0)]]


def a1111(text: str) -> Segments:
    """Reads weights and BREAK. Brackets that do not match are closed at the end, or taken for text."""
    segments: list[list[list]] = [[]]
    open_brackets: list[tuple[str, list[list]]] = []  # each with the pieces within it

    def add(words: str) -> None:
        piece = [words, 1.0]
        segments[-1].append(piece)
        for _, within in open_brackets:
            within.append(piece)

    def close(factor: float) -> None:
        for piece in open_brackets.pop()[1]:
            piece[1] *= factor

    for token in _TOKENS.findall(text):
        last = open_brackets[-1][0] if open_brackets else ""
        if token.startswith("\\") and len(token) > 1:
            add(token[1:])
        elif token in "([":
            open_brackets.append((token, []))
        elif token.startswith(":") and token.endswith(")") and last == "(":
            close(float(token[1:-1]))
        elif token == ")" and last == "(":
            close(STEP)
        elif token == "]" and last == "[":
            close(1 / STEP)
        elif token == "BREAK":
            segments.append([])
        else:
            add(token)
    while open_brackets:
        close(STEP if open_brackets[-1][0] == "(" else 1 / STEP)
    return [_joined(segment) for segment in segments]


def _joined(segment: list[list]) -> list[Piece]:
    """Neighbours of one weight as one piece: a word must reach the tokenizer whole."""
    joined: list[Piece] = []
    for words, weight in segment:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + words, weight)
        else:
            joined.append((words, weight))
    return joined


READERS: dict[str, Callable[[str], Segments]] = {"plain": plain, "a1111": a1111}


@dataclass(frozen=True)
class Prompts:
    """Encodes texts in one syntax. `chunk`: long texts become several chunks; else each segment is cut after one.

    SDXL has two encoders, whose states stand side by side. Only the second one gives a pooled text, and that is the
    first chunk's, without weights.
    """

    encoders: tuple[TextEncoder, ...]
    read: Callable[[str], Segments] = plain
    chunk: bool = False

    def __call__(self, texts: Sequence[str | None]) -> list[Encoded]:
        """Texts -> states (T, D) each, T the encoders' length times the text's chunks; and pooled (P,) or None.

        A text that is None becomes zeros.
        """
        return [self._encoded(text) for text in texts]

    def tokens_cut(self, text: str) -> int:
        """How many of the text's tokens the model does not see."""
        if self.chunk:
            return 0
        room = self.encoders[0].length - 2
        return sum(max(0, len(tokens) - room) for tokens in self._segments(text, self.encoders[0]))

    def _segments(self, text: str, encoder: TextEncoder) -> list[list[Token]]:
        """Each segment's tokens with their weights, the marks of begin and end apart."""
        segments = []
        for segment in self.read(text):
            tokens: list[Token] = []
            for words, weight in segment:
                # verbose=False: transformers otherwise warns about every long text.
                ids = encoder.tokenizer(
                    encoder.spelled(words), add_special_tokens=False, truncation=False, verbose=False
                ).input_ids
                tokens += [(token, weight) for token in ids]
            segments.append(tokens)
        return segments

    def _encoded(self, text: str | None) -> Encoded:
        import torch

        both = [self._encoded_by(encoder, text or "") for encoder in self.encoders]
        states_TD = torch.cat([states_TD for states_TD, _ in both], dim=-1)
        pooled_P = both[-1][1]
        if text is None:
            return torch.zeros_like(states_TD), None if pooled_P is None else torch.zeros_like(pooled_P)
        return states_TD, pooled_P

    def _encoded_by(self, encoder: TextEncoder, text: str) -> Encoded:
        import torch

        room = encoder.length - 2
        chunks: list[list[Token]] = []
        for tokens in self._segments(text, encoder):
            many = [tokens[i : i + room] for i in range(0, max(1, len(tokens)), room)]
            chunks += many if self.chunk else many[:1]
        ids_NT = torch.tensor([_filled([token for token, _ in chunk], encoder) for chunk in chunks])
        weights_NT = torch.ones(ids_NT.shape)
        for i, chunk in enumerate(chunks):
            weights_NT[i, 1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
        with torch.no_grad():
            states_NTD, pooled_NP = encoder.states_and_pooled(ids_NT)
        return weighted(states_NTD, weights_NT).flatten(0, 1), None if pooled_NP is None else pooled_NP[0]


def _filled(tokens: list[int], encoder: TextEncoder) -> list[int]:
    tokenizer = encoder.tokenizer
    marked = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    return marked + [tokenizer.pad_token_id] * (encoder.length - len(marked))


def prompts_for(model: Model, syntax: str, long_prompts: str) -> Prompts | None:
    """How prompts are read under the job's two settings; None: as the model itself reads them."""
    if (syntax, long_prompts) == ("plain", "truncate"):
        return None
    encoders = (model.text,) if model.text_2 is None else (model.text, model.text_2)
    return Prompts(encoders, READERS[syntax], long_prompts == "chunk")


def weighted(states_NTD: Tensor, weights_NT: Tensor) -> Tensor:
    """States times weights, each chunk brought back to the mean that it had; untouched where all weights are 1.

    A mean so near 0 that this would more than double or halve the states, or turn them over, is not restored.
    """
    if bool((weights_NT == 1).all()):
        return states_NTD
    z_NTD = states_NTD.float()
    scaled_NTD = z_NTD * weights_NT.to(z_NTD)[..., None]
    before_N11, after_N11 = (each.mean((1, 2), keepdim=True) for each in (z_NTD, scaled_NTD))
    factor_N11 = before_N11 / after_N11
    sane = (factor_N11 > 0.5) & (factor_N11 < 2)
    return (scaled_NTD * factor_N11.where(sane, 1.0)).to(states_NTD)
