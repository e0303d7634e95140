"""The written folder, read by transformers' own CLIPTokenizer."""

import json

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from batchsd.training.captions import WORDS, held_out_captions
from batchsd.training.tokenizer import END, START, byte_alphabet, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, [*WORDS, "grün"], max_length=32)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def test_each_word_is_one_token(tokenizer):
    for word in (*WORDS, "grün"):
        assert len(tokenizer(word).input_ids) == 3, word
    text = "a small green cone on the left, white floor, gray wall"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == [
        START,
        *(f"{word}</w>" for word in text.replace(",", " ,").split()),
        END,
    ]
    assert len({tokenizer(word).input_ids[1] for word in WORDS}) == len(WORDS)


@pytest.mark.parametrize("text", ["zebra", "bred", "reds", "cubeless", "ünïcode", "42", "cube!?", "e"])
def test_other_text_falls_back_to_bytes_and_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert len(ids) > 3 or len(text) == 1
    assert max(ids[1:-1]) < len(tokenizer) - 2  # never the unknown token
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text


def test_special_tokens_padding_and_length(tokenizer):
    size = len(tokenizer)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (size - 2, size - 1)
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == size - 1
    assert tokenizer.model_max_length == 32
    ids = tokenizer(["A RED cube", "red " * 50], padding="max_length", truncation=True).input_ids
    words = [tokenizer(word).input_ids[1] for word in ("a", "red", "cube")]
    assert ids[0][:5] == [size - 2, *words, size - 1]
    assert [len(row) for row in ids] == [32, 32] and ids[1][-1] == size - 1


def test_full_captions_fit(tokenizer):
    assert max(len(tokenizer(text).input_ids) for text, _ in held_out_captions(64)) <= 20


def test_files_hold_clips_layout(tmp_path):
    write_tokenizer(tmp_path, ["red"])
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(512 + 2 + 2))
    assert (vocab["!"], vocab["!</w>"], vocab["ed</w>"], vocab["red</w>"]) == (0, 256, 512, 513)
    assert (tmp_path / "merges.txt").read_text().splitlines() == ["#version: 0.2", "e d</w>", "r ed</w>"]
    assert set(byte_alphabet()) == set(ByteLevel.alphabet()) and len(byte_alphabet()) == 256
