"""Pages of a mapped file are given back, and read again when looked at; other memory is left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from batchsd.model.pages import mapped_ranges, release
from batchsd.model.weights import read_safetensors

SIZE = 64 << 20  # bytes


def mapped_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssFile"].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="madvise and /proc are Linux's")
def test_pages_are_given_back(tmp_path: Path) -> None:
    save_file({"a": torch.arange(SIZE // 4, dtype=torch.float32)}, tmp_path / "a.safetensors")
    value = read_safetensors(tmp_path / "a.safetensors")["a"]
    ranges = mapped_ranges()
    untouched = mapped_bytes()
    total = value.sum()
    looked_at = mapped_bytes()
    release(value, ranges)
    assert looked_at - untouched > 0.9 * SIZE
    assert mapped_bytes() - untouched < 0.1 * SIZE
    assert torch.equal(value.sum(), total)


def test_memory_of_no_file_is_left_alone() -> None:
    value = torch.ones(1 << 20)
    release(value, mapped_ranges())
    assert bool((value == 1).all())
