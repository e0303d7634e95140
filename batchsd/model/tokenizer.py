"""The tokenizer: a checkpoint's own files, or the standard CLIP vocabulary that ships with batchsd.

A single file carries none. The vocabulary is CLIP's: 256 bytes, the same with an end-of-word mark, 48,894 merges
and two marks, 49,408 in all; assets/clip-tokenizer names its origin and licence.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from batchsd.types import UsageError

CLIP_VOCABULARY = 49408
_MERGES = 49152 - 256 - 2  # the file has more; CLIP reads these
_TABLE = Path(__file__).parent.parent / "assets" / "clip-tokenizer" / "bpe_simple_vocab_16e6.txt.gz"


def load_tokenizer(folder: Path) -> Any:
    """transformers' CLIPTokenizer from its files. Raises `UsageError` where they are missing or broken."""
    from transformers import CLIPTokenizer

    if not folder.is_dir():
        raise UsageError(f"{folder}: missing; a checkpoint folder in diffusers layout has it")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{folder}: not loadable as a CLIP tokenizer ({first})") from None


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """The standard CLIP tokenizer, 77 tokens. SD1 and SDXL's first encoder pad with the end mark, others with "!"."""
    from transformers import CLIPTokenizer

    lines = gzip.decompress(_TABLE.read_bytes()).decode("utf-8").split("\n")
    merges: list[Any] = [tuple(line.split()) for line in lines[1 : _MERGES + 1]]  # the first line is a version
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, merges, pad_token=pad, model_max_length=77)


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte, in CLIP's order: first the bytes that are printable as they are."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]
