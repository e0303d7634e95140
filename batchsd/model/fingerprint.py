"""What a checkpoint is, in 128 bits: the same for a copy elsewhere, another for any other weights.

Hashed are, file by file: the name within the checkpoint, the size, and the whole content where it is small, else
its beginning (the header of a safetensors file lies there) and blocks spread evenly over the rest. Reading
gigabytes in full would cost more than loading them. Needs no torch: the driver asks before anything loads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from batchsd.types import UsageError

_BLOCK = 1 << 16
_BLOCKS = 256  # 16 MiB of a file are read at most


def checkpoint_hash(path: Path, extras: Sequence[tuple[str, Path]] = ()) -> str:
    """32 hex digits for a checkpoint folder or file, with what `extras.extra_files` adds to it.

    Raises `UsageError` where there is none.
    """
    own = _hash(path, "model.path")
    if not extras:
        return own
    digest = hashlib.blake2b(own.encode(), digest_size=16)
    for use, file in extras:
        digest.update(f"{use}\0{_hash(file, use)}\0".encode())
    return digest.hexdigest()


def content_hash(path: Path, what: str) -> str:
    """32 hex digits for a file or folder of weights that a plugin loads. Raises `UsageError` where there is none."""
    return _hash(path, what)


def _hash(path: Path, what: str) -> str:
    if not path.exists():
        raise UsageError(f"{what}: {path} does not exist")
    files = [path] if path.is_file() else sorted(_files(path))
    if not files:
        raise UsageError(f"{what}: {path} holds no config or weights")
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        for block in _blocks(file, size):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """All that changes pictures; notes and pictures beside it do not."""
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix in (".json", ".safetensors", ".txt", ".bin", ".ckpt", ".pt"):
            yield file


def _blocks(file: Path, size: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        if size <= _BLOCK * _BLOCKS:
            yield stream.read()
            return
        for i in range(_BLOCKS):
            stream.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
            yield stream.read(_BLOCK)
