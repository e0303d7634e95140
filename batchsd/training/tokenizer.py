"""Writes a CLIP-format tokenizer in which every given word is one token and all else falls back to bytes.

The vocabulary is CLIP's byte alphabet, plain and with the end-of-word mark, then one merge chain a word, from
the right: red -> e+d</w>, r+ed</w>. Every merge joins one letter to the word's end, so chains never disturb
each other, whatever their order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32  # the longest caption of the scenes has 20 tokens, both ends counted
END_OF_WORD = "</w>"


def byte_alphabet() -> list[str]:
    """One printable character for each byte, in CLIP's order (`bytes_to_unicode` of the GPT-2 encoder)."""
    return list(_letters().values())


def _letters() -> dict[int, str]:
    """Byte -> its character: itself where it prints, else the next free one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merge_chain(word: str) -> list[tuple[str, str]]:
    """The merges that make a word one token, in the order in which they happen."""
    letters = _letters()
    word = "".join(letters[byte] for byte in word.encode())
    return [(word[i], word[i + 1 :] + END_OF_WORD) for i in range(len(word) - 2, -1, -1)]


def write_tokenizer(folder: Path | str, words: Iterable[str], max_length: int = MAX_LENGTH) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json into `folder`.

    `words` are lower-case; the start and end tokens get the last two ids, and the end token pads.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = byte_alphabet()
    merges = list(dict.fromkeys(merge for word in words for merge in merge_chain(word)))
    tokens = [*alphabet, *(char + END_OF_WORD for char in alphabet), *(a + b for a, b in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }

    def write(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    write("vocab.json", json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    write("merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write("tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write("special_tokens_map.json", json.dumps(special, indent=2) + "\n")
