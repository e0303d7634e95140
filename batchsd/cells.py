"""A manifest cell that stands for a picture becomes the bytes of a file.

    bytes | struct<bytes, path> | path (of the manifest's folder, or absolute) | object-store URI | base64 | https

Every read is bounded, and only plain files are read. What is wrong with a cell is its row's `bad_image`; a
store that fails is no row's fault.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from batchsd.find import Disk
from batchsd.redact import redact
from batchsd.types import InfrastructureError, RowError

MAX_BYTES = 2**26  # a 4096 x 4096 picture as PNG has at most 48 MiB
GOOGLE_SECONDS = 20  # its client would try again for 15 minutes, and hold up the end of the process meanwhile
SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs")
DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
# base64 of the first bytes of PNG, JPEG, WebP and GIF. No path with an extension matches: base64 has no dot.
BARE_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|UklGR|R0lGOD)[A-Za-z0-9+/\s]{40,}={0,2}\s*")


@dataclass(frozen=True, slots=True)
class Cells:
    """Where the paths of one manifest file begin: its store and its folder there. `fetch` asks the web, if any may."""

    disk: Disk
    folder: str
    fetch: Callable[[str, int], bytes] | None = None

    def read(self, cell: Any) -> bytes:
        """The file that a cell stands for. Raises RowError `bad_image`, or InfrastructureError."""
        if isinstance(cell, dict):
            cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
        if isinstance(cell, bytes | bytearray | memoryview):
            return _bounded(bytes(cell))
        if isinstance(cell, list):
            return _array_file(cell)
        if not isinstance(cell, str) or not cell:
            given = "an empty text" if cell == "" else type(cell).__name__
            raise bad(f"{given} is neither a picture's bytes nor the path of one")
        if found := DATA_URI.match(cell):
            return _bounded(_unpacked(cell[found.end() :]))
        if BARE_BASE64.fullmatch(cell):
            return _bounded(_unpacked(cell))
        return self._file(cell)

    def _file(self, cell: str) -> bytes:
        shown = redact(cell if len(cell) <= 200 else cell[:197] + "...")
        scheme = urlsplit(cell).scheme.lower() if "://" in cell else ""
        if scheme in ("http", "https"):
            if self.fetch is None:
                host = urlsplit(cell).hostname or "a.host"
                raise bad(f"{shown}: pictures are fetched from no host but those of input.allow_hosts = ['{host}']")
            return _bounded(self.fetch(cell, MAX_BYTES))
        if scheme and scheme not in SCHEMES or "\0" in cell:
            raise bad(f"{shown}: a path, or a URI of {', '.join(SCHEMES)}")
        if scheme:
            return _read(*_uri(cell, shown), shown)
        if posixpath.isabs(cell):
            return _read(pafs.LocalFileSystem(), cell, shown)
        return _read(_opened(self.disk), posixpath.normpath(posixpath.join(self.folder, cell)), shown)


def bad(what: str) -> RowError:
    return RowError("bad_image", what)


@lru_cache(maxsize=64)
def _opened(disk: Disk) -> pafs.FileSystem:
    return disk.files()


@lru_cache(maxsize=64)
def _store(base: str) -> tuple[pafs.FileSystem, str]:
    """Opened once: an object store's client takes a second, and asks for the bucket's region."""
    if base.startswith(("gs:", "gcs:")) and "retry_limit_seconds" not in base:
        base += f"{'&' if '?' in base else '?'}retry_limit_seconds={GOOGLE_SECONDS}"
    return pafs.FileSystem.from_uri(base)


def _uri(cell: str, shown: str) -> tuple[pafs.FileSystem, str]:
    base, mark, query = cell.partition("?")
    parts = urlsplit(base)
    try:
        files, top = _store(f"{parts.scheme}://{parts.netloc}{'' if parts.netloc else '/'}{mark}{query}")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError) as error:
        raise bad(f"{shown}: {_first_line(error)}") from None
    except OSError as error:
        kind = bad if str(error).endswith("not found") else InfrastructureError  # a bucket that is nowhere
        raise kind(f"{shown}: {_first_line(error)}") from None
    path = unquote(base.partition("://")[2][len(parts.netloc) :])
    return files, top.rstrip("/") + path


def _read(files: pafs.FileSystem, path: str, shown: str) -> bytes:
    try:
        info = files.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise bad(f"{shown}: no such file")
        if info.type != pafs.FileType.File:
            raise bad(f"{shown}: not a plain file")
        if info.size > MAX_BYTES:
            raise bad(f"{shown}: {info.size:,} bytes, at most {MAX_BYTES:,}")
        with files.open_input_stream(path) as stream:
            return _bounded(stream.read(MAX_BYTES + 1))
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise bad(f"{shown}: {_first_line(error)}") from None
    except (pa.ArrowInvalid, UnicodeError, ValueError) as error:
        raise bad(f"{shown}: not a path that can be opened ({_first_line(error)})") from None
    except OSError as error:
        if isinstance(files, pafs.LocalFileSystem):
            raise bad(f"{shown}: {os.strerror(error.errno) if error.errno else _first_line(error)}") from None
        raise InfrastructureError(f"{shown}: {_first_line(error)}") from None


def _bounded(content: bytes) -> bytes:
    if not content:
        raise bad("an empty file: zero bytes")
    if len(content) > MAX_BYTES:
        raise bad(f"more than {MAX_BYTES:,} bytes")
    return content


def _unpacked(text: str) -> bytes:
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise bad(f"more than {MAX_BYTES:,} bytes in base64")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise bad("a data URI whose base64 is damaged") from None


def _array_file(rows: list[Any]) -> bytes:
    """Nested lists of numbers (a depth map in Parquet's own types) as a .npy file."""
    import numpy as np

    try:
        values = np.asarray(rows, np.float32)
    except (TypeError, ValueError):
        raise bad("a list that is no rectangle of numbers") from None
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return _bounded(file.getvalue())


def _first_line(error: Exception) -> str:
    return redact(str(error).splitlines()[0]) if str(error) else type(error).__name__
