"""Finding and opening manifest files, on a local disk or an object store, through pyarrow.fs."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from batchsd.redact import redact
from batchsd.types import InfrastructureError, UsageError

BUFFER_BYTES = 2**20  # read column chunks by pieces, not whole
HASH_BYTES = 2**22
WILDCARDS = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Disk:
    """Where manifest files lie, openable again on any worker: a URI, or "" for the local disk."""

    uri: str

    def files(self) -> pafs.FileSystem:
        with reading(self.uri):
            return pafs.FileSystem.from_uri(self.uri)[0] if self.uri else pafs.LocalFileSystem()


@contextmanager
def reading(where: str, disk: Disk | None = None) -> Iterator[None]:
    """Turns what pyarrow raises into one line that begins with `where`.

    Damaged content is a UsageError (again would not help), a store that fails an InfrastructureError.
    """
    where = redact(where)
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"{where}: no such file") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: not a readable Parquet file: {_first_line(error)}{_converted(where)}") from None
    except OSError as error:
        # pyarrow raises a bare OSError for damaged pages; a disk or a network error carries its number.
        damaged = error.errno is None and not str(error).startswith("AWS") and not (disk and disk.uri)
        kind = UsageError if damaged or isinstance(error, PermissionError) else InfrastructureError
        raise kind(f"{where}: cannot be read: {_first_line(error)}") from None


def _converted(where: str) -> str:
    """How a table of another format becomes Parquet."""
    stem, _, extension = where.rpartition(".")
    reader = {"csv": "csv.read_csv", "json": "json.read_json", "jsonl": "json.read_json"}.get(extension.lower())
    name = posixpath.basename(stem)
    if reader is None or not re.fullmatch(r"[\w.-]+", name):  # what stands in a shell's line must be plain
        return ""
    return (
        f"; to make one: python -c \"from pyarrow import csv, json, parquet; "
        f"parquet.write_table({reader}('{name}.{extension}'), '{name}.parquet')\""
    )


def _first_line(error: Exception) -> str:
    return redact(str(error).splitlines()[0]) if str(error) else type(error).__name__


@dataclass(frozen=True, slots=True)
class Found:
    """A file of the manifest: its full path, and its name below the manifest's root."""

    path: str
    name: str
    size: int
    mtime_ns: int


def find(uri: str) -> tuple[Disk, list[Found]]:
    """The Parquet files that a path, glob, folder or URI stands for, in order of their names.

    In a glob `*` and `?` stay within a folder and `**` crosses them (in a URI `?` begins its query); a folder
    is taken with all that lies below it. Names that begin with `_` or `.` are left out. Raises UsageError
    where there is nothing.
    """
    disk, path = _split(uri)
    files = disk.files()
    with reading(uri, disk):
        info = files.get_file_info(path)
        if info.type == pafs.FileType.File:
            return disk, [_found(info, posixpath.dirname(path))]
        if info.type == pafs.FileType.Directory:
            root, wanted = path, re.compile(r"(.*/)?[^/]*\.parquet", re.IGNORECASE)
        elif WILDCARDS.search(path):
            root, wanted = _glob(path)
        else:
            raise UsageError(f"{redact(uri)}: no such file or folder")
        # A glob of one folder need not list the folders below it.
        below = root == path or "/" in path[len(root) + 1 :] or "**" in path
        selector = pafs.FileSelector(root, allow_not_found=True, recursive=below)
        infos = [info for info in files.get_file_info(selector) if info.type == pafs.FileType.File]
    found = [_found(info, root) for info in infos]
    found = [file for file in found if wanted.fullmatch(file.name) and not re.search(r"(^|/)[_.]", file.name)]
    if not found:
        what = "no .parquet file in this folder" if root == path else "no file matches"
        raise UsageError(f"{redact(uri)}: {what}")
    return disk, sorted(found, key=lambda file: file.name)


def find_all(uris: Sequence[str]) -> tuple[Disk, list[Found]]:
    """The files of several such places on one store, in the order given.

    Where two files would have one name, the later one's gets as many of the folders around it as tell them apart:
    what is appended to the list never renames what was there. Raises UsageError, one line for each place that is
    wrong, and where one file is meant twice.
    """
    disks, found, wrong = list[Disk](), dict[str, Found](), list[str]()
    paths = set[str]()
    for uri in uris:
        try:
            disk, files = find(uri)
        except UsageError as error:
            wrong.append(str(error))
            continue
        disks.append(disk)
        if disk.uri != disks[0].uri and not disk.files().equals(disks[0].files()):
            wrong.append(f"{redact(uri)}: lies on another store than {redact(uris[0])}; give each a run of its own")
            continue
        for file in files:
            if file.path in paths:
                wrong.append(f"{redact(uri)}: {file.path} is in the list twice")
                continue
            paths.add(file.path)
            file = _named_apart(file, found)
            found[file.name] = file
    if wrong:
        raise UsageError("\n".join(wrong))
    return disks[0], list(found.values())


def _named_apart(file: Found, taken: Container[str]) -> Found:
    name = file.name
    above = file.path.strip("/").removesuffix(name).strip("/").split("/")
    while name in taken and above[-1:] != [""] and above:
        name = f"{above.pop()}/{name}"
    return replace(file, name=name)


def disk_of(uris: str | Sequence[str]) -> Disk:
    """The disk alone, whether or not anything is there."""
    return _split(uris if isinstance(uris, str) else uris[0])[0]


def _split(uri: str) -> tuple[Disk, str]:
    if "://" not in uri:
        return Disk(""), uri
    base, mark, query = uri.partition("?")
    fixed = WILDCARDS.split(base)[0].rpartition("/")[0] if WILDCARDS.search(base) else base
    try:
        _, path = pafs.FileSystem.from_uri(fixed + mark + query)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(f"{redact(uri)}: not a place that can be opened: {_first_line(error)}") from None
    return Disk(fixed + mark + query), path + base[len(fixed) :]


def _glob(path: str) -> tuple[str, re.Pattern[str]]:
    """The folder before the first wildcard, and the pattern of the names below it."""
    fixed = WILDCARDS.split(path)[0].rpartition("/")[0]
    pattern = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]*\]|.", path[len(fixed) :].lstrip("/")):
        wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        is_class = len(token) > 2 and token[0] == "["
        pattern += wild.get(token) or (token.replace("[!", "[^", 1) if is_class else re.escape(token))
    return fixed or "/", re.compile(pattern)


def _found(info: pafs.FileInfo, root: str) -> Found:
    name = info.path[len(root) :].lstrip("/") if root else info.path
    return Found(info.path, name, info.size, info.mtime_ns or 0)


def open_parquet(disk: Disk, path: str, where: str, dictionaries: list[str] | None = None) -> pq.ParquetFile:
    """A Parquet file, its footer read. `dictionaries` are columns to keep dictionary-encoded as stored.

    Page checksums are verified where the file has them, and column chunks are read by pieces.
    """
    with reading(where, disk):
        return pq.ParquetFile(
            disk.files().open_input_file(path),
            read_dictionary=dictionaries,
            buffer_size=BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )


def sha256(disk: Disk, path: str, where: str) -> str:
    """The file's sha256 in hex, read as a stream."""
    state = hashlib.sha256()
    with reading(where, disk), disk.files().open_input_stream(path) as stream:
        while chunk := stream.read(HASH_BYTES):
            state.update(chunk)
    return state.hexdigest()
