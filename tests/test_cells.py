"""Every form of a cell gives the same file; everything else is a clear `bad_image`."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest

import batchsd.cells
from batchsd import object_store
from batchsd.cells import Cells
from batchsd.find import Disk
from batchsd.types import RowError

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "sub dir").mkdir(parents=True)
    for name in ("in/a.png", "in/sub dir/b%.png", "up.png"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "in" / "empty.png").write_bytes(b"")
    return tmp_path


def read(folder: Path, cell: object) -> bytes:
    return Cells(Disk(""), str(folder / "in")).read(cell)


FORMS = {
    "bytes": lambda folder: PNG,
    "struct": lambda folder: {"bytes": PNG, "path": "elsewhere.png"},
    "struct of empty path": lambda folder: {"bytes": PNG, "path": None},
    "struct of path": lambda folder: {"bytes": None, "path": "a.png"},
    "beside the manifest": lambda folder: "a.png",
    "below it": lambda folder: "sub dir/b%.png",
    "above it": lambda folder: "../up.png",
    "absolute": lambda folder: str(folder / "in/a.png"),
    "file URI": lambda folder: (folder / "in/a.png").as_uri(),
    "file URI, escaped": lambda folder: (folder / "in/sub dir/b%.png").as_uri(),
    "data URI": lambda folder: "data:image/png;base64," + base64.b64encode(PNG).decode(),
    "base64": lambda folder: base64.b64encode(PNG).decode(),
    "base64 in lines": lambda folder: base64.encodebytes(PNG).decode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(folder: Path, form: str) -> None:
    assert read(folder, FORMS[form](folder)) == PNG


def test_an_object_store_is_read_through_its_uri(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import fs

    asked = []

    def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
        asked.append(uri)
        return fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem()), "in"

    monkeypatch.setattr(
        batchsd.cells.pafs, "FileSystem", type("Stub", (), {"from_uri": staticmethod(from_uri)})
    )
    batchsd.cells._store.cache_clear()
    try:
        for _ in range(2):
            assert read(folder, "s3://in/sub dir/b%25.png?region=eu&endpoint_override=x") == PNG
        assert asked == ["s3://in?region=eu&endpoint_override=x"], "a store is opened once"
    finally:
        batchsd.cells._store.cache_clear()


def test_a_real_object_store(bucket: str, folder: Path) -> None:
    """By its own URI, and beside a manifest that lies there; what is not there is the row's."""
    object_store.client().put_object(Bucket=bucket, Key="pics/a b.png", Body=PNG)
    assert read(folder, f"s3://{bucket}/pics/a b.png") == PNG
    assert Cells(Disk(f"s3://{bucket}/pics"), f"{bucket}/pics").read("a b.png") == PNG
    for missing in (f"s3://{bucket}/none.png", "s3://no-such-bucket-here/a.png"):
        with pytest.raises(RowError, match="no such file"):
            read(folder, missing)


def test_paths_begin_where_the_manifest_lies(folder: Path) -> None:
    disk = Disk((folder / "in").as_uri())
    assert Cells(disk, str(folder / "in")).read("a.png") == PNG


def test_lists_of_numbers_are_an_array(folder: Path) -> None:
    found = np.load(io.BytesIO(read(folder, [[1, 2.5], [3, -4]])))
    assert found.tolist() == [[1, 2.5], [3, -4]]


BAD = {
    "zero bytes": (b"", "zero bytes"),
    "empty file": ("empty.png", "zero bytes"),
    "empty text": ("", "neither a picture's bytes nor the path"),
    "number": (7, "int is neither"),
    "null struct": ({"bytes": None, "path": None}, "NoneType is neither"),
    "missing": ("b.png", r"^b\.png: no such file$"),
    "folder": ("sub dir", "not a plain file"),
    "through a file": ("a.png/b.png", r"a\.png/b\.png: "),
    "zero device": ("/dev/zero", "not a plain file"),
    "web": (
        "https://u:secret@host/a.png?key=1",
        r"^https://<redacted>@host/a\.png\?<redacted>: .*input.allow_hosts = \['host'\]",
    ),
    "other scheme": ("ftp://host/a.png", "a path, or a URI of file, s3"),
    "NUL": ("a\0.png", "a path, or a URI"),
    "damaged data URI": ("data:image/png;base64,####", "base64 is damaged"),
    "ragged list": ([[1, 2], [3]], "no rectangle"),
    "list of text": ([["a"]], "no rectangle"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_cells(folder: Path, what: str) -> None:
    cell, message = BAD[what]
    with pytest.raises(RowError, match=message) as error:
        read(folder, cell)
    assert error.value.status == "bad_image" and "\n" not in str(error.value)


def test_files_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchsd.cells, "MAX_BYTES", len(PNG) - 1)
    for cell in (PNG, "a.png", base64.b64encode(PNG).decode()):
        with pytest.raises(RowError, match=f"at most {len(PNG) - 1}|more than {len(PNG) - 1}"):
            read(folder, cell)


def test_a_pipe_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "in" / "pipe.png")
    with pytest.raises(RowError, match="not a plain file"):
        read(folder, "pipe.png")
