"""The shipped vocabulary gives CLIP's published numbers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import batchsd
from batchsd.model.tokenizer import CLIP_VOCABULARY, clip_tokenizer

# From OpenAI's and Hugging Face's documentation of CLIP's tokenizer, and diffusers' own tests.
KNOWN = {
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "A  PHOTO of a Cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "": [49406, 49407],
    "hello world": [49406, 3306, 1002, 49407],
}


def test_known_numbers() -> None:
    tokenizer = clip_tokenizer("!")
    assert len(tokenizer) == CLIP_VOCABULARY
    assert {text: tokenizer(text).input_ids for text in KNOWN} == KNOWN
    padded = tokenizer("a cat", padding="max_length").input_ids
    assert len(padded) == 77 and padded[4:] == [0] * 73
    assert clip_tokenizer().pad_token_id == 49407


def test_origin_and_licence_are_named() -> None:
    folder = Path(batchsd.__file__).parent / "assets" / "clip-tokenizer"
    content = (folder / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    origin = (folder / "ORIGIN.md").read_text()
    assert hashlib.sha256(content).hexdigest() in origin and "MIT" in origin
