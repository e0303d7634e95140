"""Where a run folder lives: the few storage operations that the ledger and the workers need.

`create_only` is the one that decides anything: of any number of writers exactly one is told True. The others
may be repeated without harm. Names are relative, with `/`; a name never leaves the root.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, Protocol

from batchsd.redact import redact
from batchsd.scratch import Scratch, disk_trouble
from batchsd.types import UsageError

LONGEST_WRITE = 600.0  # seconds, of one small file
AT_ONCE = 16  # bundles of small files that are read at the same time
BUNDLE = 64  # files: fewer, and handing them to threads takes longer than reading them
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")  # a file before it has its name


class Store(Protocol):
    """One run folder on some storage. Every method raises InfrastructureError where the storage fails."""

    uri: str

    def create_only(self, name: str, data: bytes) -> bool:
        """Write a whole, durable file, unless one of that name exists: then change nothing, return False."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write or replace a whole file: a reader sees the old bytes or the new ones."""
        ...

    def read(self, name: str) -> bytes | None:
        """The file's bytes, or None where there is none."""
        ...

    def read_each(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """`read` of many files, in their order."""
        ...

    def open(self, name: str) -> BinaryIO | None:
        """The file, to be read at any place, or None where there is none."""
        ...

    def entries(self, folder: str) -> Iterator[tuple[str, int]]:
        """All files below `folder` as (name relative to it, bytes), in no order; none where it is absent."""
        ...

    def children(self, folder: str) -> list[str]:
        """The names directly in `folder`, sorted; none where it is absent."""
        ...

    def publish(self, pairs: Sequence[tuple[str, str]]) -> bool:
        """Bring staged files (source, target) under their final names, replacing; False where a source is gone."""
        ...

    def remove(self, folder: str) -> None:
        """Remove a file, or a folder and all in it; one that is absent, or that others remove too, is fine."""
        ...

    def tidy(self, folder: str) -> None:
        """Remove what writes that were cut off left directly in `folder`, if they leave anything."""
        ...

    def scratch(self, folder: str) -> Path:
        """A new local folder in which this worker builds what `hand_in` brings to `folder`."""
        ...

    def hand_in(self, folder: str) -> None:
        """Make the files of `scratch(folder)` durable under `folder`."""
        ...


class LocalStore:
    """A run folder on a local or shared POSIX file system that has hard links and atomic rename.

    Workers build their files in `building`, where it is given, else in the staging folder itself.
    """

    def __init__(self, root: Path, building: Scratch | None = None) -> None:
        self.root = root
        self.uri = str(root)
        self.building = building

    def create_only(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        with disk_trouble(path), self._temporary(path, data) as temporary:
            try:
                os.link(temporary, path)  # rename would replace, O_EXCL show a part
            except FileExistsError:
                return False
            _sync_folder(path.parent)
            return True

    def put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with disk_trouble(path), self._temporary(path, data) as temporary:
            os.replace(temporary, path)
            _sync_folder(path.parent)

    def read(self, name: str) -> bytes | None:
        path = self._place(name)  # a run may have 100,000 markers, and pathlib takes longer than the disk
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            with disk_trouble(Path(path)):
                raise

    def read_each(self, names: Iterable[str]) -> Iterator[bytes | None]:
        def read(some: Sequence[str]) -> list[bytes | None]:
            return [self.read(name) for name in some]

        waiting = iter(names)
        with ThreadPoolExecutor(AT_ONCE) as pool:  # each may be a journey over the network
            while wave := list(islice(waiting, AT_ONCE * BUNDLE)):
                bundles = [wave[i : i + BUNDLE] for i in range(0, len(wave), BUNDLE)]
                yield from chain.from_iterable(pool.map(read, bundles) if len(bundles) > 1 else map(read, bundles))

    def open(self, name: str) -> BinaryIO | None:
        path = self._path(name)
        with disk_trouble(path):
            try:
                return path.open("rb")
            except (FileNotFoundError, NotADirectoryError):
                return None

    def entries(self, folder: str) -> Iterator[tuple[str, int]]:
        top = self._path(folder)
        with disk_trouble(top):
            yield from _files_below(str(top), "")

    def children(self, folder: str) -> list[str]:
        path = self._path(folder)
        with disk_trouble(path):
            try:
                return sorted(os.listdir(path))
            except FileNotFoundError:
                return []

    def publish(self, pairs: Sequence[tuple[str, str]]) -> bool:
        whole, parents = True, set()
        for source, target in pairs:
            path = self._path(target)
            with disk_trouble(path):
                _make_folder(path.parent)
                try:
                    os.replace(self._path(source), path)
                    parents.add(path.parent)
                except FileNotFoundError:
                    whole = False
        for parent in parents:
            with disk_trouble(parent):
                _sync_folder(parent)
        return whole

    def remove(self, folder: str) -> None:
        path = self._path(folder)
        with suppress(OSError):
            path.unlink()
            return
        shutil.rmtree(path, ignore_errors=True)

    def tidy(self, folder: str) -> None:
        for name in self.children(folder):
            if TEMPORARY.fullmatch(name):
                path = self._path(f"{folder}/{name}" if folder else name)
                with suppress(OSError):  # its writer was alive, and faster
                    if time.time() - path.stat().st_mtime > LONGEST_WRITE:
                        path.unlink()

    def scratch(self, folder: str) -> Path:
        if self.building is not None:
            return self.building.make(folder)
        path = self._path(folder)
        with disk_trouble(path):
            _make_folder(path.parent)
            path.mkdir()
        return path

    def hand_in(self, folder: str) -> None:
        path = self._path(folder)
        with disk_trouble(path):
            if self.building is not None:  # staging must lie in the file system of `data/`, to be renamed
                _make_folder(path.parent)
                shutil.move(self.building.place(folder), path)
                self.building.remove(folder)
            for below, _, names in os.walk(path):
                for name in names:
                    with open(os.path.join(below, name), "rb") as file:
                        os.fsync(file.fileno())
                _sync_folder(Path(below))
            _sync_folder(path.parent)

    def _path(self, name: str) -> Path:
        return Path(self._place(name))

    def _place(self, name: str) -> str:
        assert not name.startswith("/") and ".." not in name.split("/"), f"{name!r} leaves the run folder"
        return f"{self.uri}/{name}"

    @contextmanager
    def _temporary(self, path: Path, data: bytes) -> Iterator[Path]:
        _make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def open_store(uri: str, scratch: str = "") -> Store:
    """The store of a run folder: a path, or `s3://bucket/folder`. Workers build in the local folder `scratch`.

    Without it they build in the run folder itself, where that is local, else in the system's temporary folder.
    Raises UsageError for a storage that is not known.
    """
    building = Scratch(Path(scratch).absolute()) if scratch else None
    scheme = uri.partition("://")[0].lower() if "://" in uri else "file"
    if scheme == "s3":
        from batchsd.object_store import ObjectStore

        return ObjectStore(uri, building or Scratch(Path(tempfile.gettempdir())))
    if scheme != "file":
        raise UsageError(f"output.uri: {redact(uri)!r}: cannot be written; give a path, or s3://bucket/folder")
    root = Path(uri.removeprefix("file://")).absolute()
    if root.exists() and not root.is_dir():
        raise UsageError(f"output.uri: {root} is a file; give a folder")
    return LocalStore(root, building)


def _files_below(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """(name, bytes); what another driver removes while we look may be left out."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
        for entry in found:
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    yield from _files_below(entry.path, f"{prefix}{entry.name}/")
                elif entry.is_file():
                    yield prefix + entry.name, entry.stat().st_size


def _make_folder(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """A new name is on the disk only when its folder is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
