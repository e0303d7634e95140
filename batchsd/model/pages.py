"""Keeps the peak of memory low while a mapped checkpoint is copied: pages that were copied are given back.

A tensor of a mapped file is read into memory page by page as it is looked at, and stays. Where a copy of another
type or layout takes its place, the file's pages would be there twice; the kernel drops them when told so
(madvise), and would read them again if anybody still looked.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

_DONTNEED = 4  # MADV_DONTNEED in Linux's <sys/mman.h>
_MAPS = Path("/proc/self/maps")


def mapped_ranges() -> list[tuple[int, int]]:
    """Addresses (from, to) at which files lie mapped now; empty where the system does not say."""
    if not (sys.platform == "linux" and _MAPS.exists()):
        return []
    found = []
    for line in _MAPS.read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":  # only files: anonymous memory would be lost, not read again
            low, high = addresses.split("-")
            found.append((int(low, 16), int(high, 16)))
    return found


def release(value: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
    """Gives back the pages of a mapped tensor that was copied; does nothing to any other tensor."""
    page = mmap.PAGESIZE
    start = -(-value.data_ptr() // page) * page
    end = (value.data_ptr() + value.nbytes) // page * page
    if value.device.type == "cpu" and start < end and any(low <= start and end <= high for low, high in ranges):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)
