"""One shard becomes one tar for `webdataset`: `<key>.png`, `<key>.txt` (the prompt), `<key>.json` (the row).

The key is shard and row (`00042-000017`): a reader takes all up to the first dot, so a user's id will not do.
USTAR members without time or owner: the same records give the same bytes. Failed rows go aside (aside.py).
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsd.columns import picture_column, row_json
from batchsd.sinks.parquet import OpenFile
from batchsd.types import Record
from batchsd.values import Wanted, picture_name, row_index, wants

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class TarSink:
    """Writes `<folder>/<name>.tar`; takes rows with pictures only."""

    def open(self, folder: Path, name: str, schema: pa.Schema) -> TarShard:
        return TarShard(folder, name, schema)

    def reread(
        self, open_file: OpenFile, name: str, schema: pa.Schema, pictures: Wanted
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """A published shard again (see `published.Rereads`): values as JSON holds them, no columns of bytes."""
        file = open_file(f"{name}.tar")
        if file is None:
            return
        picture: dict[str, Any] = {}
        with file, tarfile.open(fileobj=file) as tar:
            for member in tar:  # picture, text, row: as they were written
                opened = tar.extractfile(member)
                assert opened is not None, member.name
                if member.name.endswith(".json"):
                    yield row_index(member.name), {**json.loads(opened.read()), picture_column(schema): picture}
                elif not member.name.endswith(".txt"):  # the last of a row's pictures is the one that was drawn
                    wanted = wants(pictures, row_index(member.name))
                    picture = {"path": member.name, "bytes": opened.read() if wanted else b""}


@dataclass(slots=True)
class TarShard:
    """A tar being written; it has its name only when it is whole."""

    folder: Path
    name: str
    schema: pa.Schema
    _tar: tarfile.TarFile = field(init=False)

    def __post_init__(self) -> None:
        self._tar = tarfile.open(self.partial, "x", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.name}.tar.partial"

    def add(self, record: Record) -> None:
        assert record.image is not None, record.request.key
        picture = picture_name(self.name, record.request.index, record.extension)
        key = picture.partition(".")[0]
        for name, content in record.made.items():
            self._member(f"{key}.{name}.png", content)
        self._member(picture, record.image)
        self._member(f"{key}.txt", record.request.prompt.encode())
        self._member(f"{key}.json", row_json(record, self.schema, self.name).encode())

    def close(self) -> None:
        """Finish the file, put it on the disk, and give it its name."""
        self._tar.close()
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
        self.partial.replace(self.partial.with_suffix(""))

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, mode is 644
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
