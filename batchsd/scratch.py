"""The local folders in which workers build a shard's files, before a store takes them.

A worker that is killed leaves its folder behind. Its lock is gone with it, so the next worker on this machine
knows the folder for dead, and removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchsd.types import InfrastructureError

PREFIX = "batchsd-"
YOUNG = 60.0  # seconds in which a folder may lie there that its maker has not locked yet


class Scratch:
    """Folders below `root`, each named after the staging folder that its files are for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._locks: dict[str, int] = {}
        self._swept = False

    def place(self, folder: str) -> Path:
        """Many runs may share a scratch folder: the nonce in the name tells them apart."""
        return self.root / f"{PREFIX}{folder.rpartition('/')[2]}"

    def make(self, folder: str) -> Path:
        """A new, empty folder of this process. Raises InfrastructureError where it exists, or cannot be made."""
        path = self.place(folder)
        with disk_trouble(path):
            self.root.mkdir(parents=True, exist_ok=True)
            if not self._swept:
                self._sweep()
            path.mkdir()
            self._locks[folder] = handle = os.open(path, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: then nothing is swept either
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path

    def remove(self, folder: str) -> None:
        shutil.rmtree(self.place(folder), ignore_errors=True)
        if (handle := self._locks.pop(folder, None)) is not None:
            os.close(handle)

    def _sweep(self) -> None:
        self._swept = True
        for path in self.root.glob(f"{PREFIX}*"):
            with suppress(OSError):  # another worker's, or gone meanwhile
                if time.time() - path.stat().st_mtime < YOUNG:
                    continue
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(handle)


@contextmanager
def disk_trouble(path: Path) -> Iterator[None]:
    """An OSError becomes an InfrastructureError that names the path and the room that is left there."""
    try:
        yield
    except OSError as error:
        what = error.strerror or " ".join(str(error).split())
        with suppress(OSError):
            free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
            raise InfrastructureError(
                f"{path}: {what} ({free / 2**20:,.0f} MiB free there); run the same command again when that is mended"
            ) from error
        raise InfrastructureError(f"{path}: {what}") from error
