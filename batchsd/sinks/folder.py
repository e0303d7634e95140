"""One shard becomes one folder of picture files with a `metadata.parquet`, as `datasets`' ImageFolder reads it.

    <name>/metadata.parquet     every column; `file_name` in place of the picture
    <name>/000/000017.png       at most 1,000 pictures a folder

Parquet, not JSON lines: a column that is null throughout one shard keeps its type. Failed rows go aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsd.columns import picture_column, to_table
from batchsd.sinks.parquet import OpenFile, read_rows
from batchsd.types import Record
from batchsd.values import Wanted, wants

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FOLDER_ROWS = 1000
GROUP_ROWS = 1000


@dataclass(frozen=True, slots=True)
class FolderSink:
    """Writes `<folder>/<name>/`; takes rows with pictures only."""

    def open(self, folder: Path, name: str, schema: pa.Schema) -> FolderShard:
        return FolderShard(folder / name, name, schema)

    def reread(
        self, open_file: OpenFile, name: str, schema: pa.Schema, pictures: Wanted
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """A published shard again (see `published.Rereads`). A picture that is gone ends it."""
        picture = picture_column(schema)
        columns = {*schema.names, file_column(picture)}
        for row in read_rows(open_file, f"{name}/metadata.parquet", columns):
            path = row.pop(file_column(picture))
            index = int(Path(path).stem)
            row[picture] = {"path": path, "bytes": b""}
            if wants(pictures, index):
                file = open_file(f"{name}/{path}")
                if file is None:
                    return
                with file:
                    row[picture]["bytes"] = file.read()
            yield index, row


@dataclass(slots=True)
class FolderShard:
    """A shard being written: pictures at once, rows a row group at a time; the table is named last."""

    folder: Path
    name: str
    schema: pa.Schema
    _rows: list[Record] = field(default_factory=list, init=False)
    _files: list[str] = field(default_factory=list, init=False)
    _writer: pq.ParquetWriter | None = field(default=None, init=False)

    def add(self, record: Record) -> None:
        assert record.image is not None, record.request.key
        index = record.request.index
        file = f"{index // FOLDER_ROWS:03d}/{index:06d}.{record.extension}"
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record.image)
        self._rows.append(record)
        self._files.append(file)
        if len(self._rows) == GROUP_ROWS:
            self._write_group()

    def close(self) -> None:
        """Finish the table and give it its name. ValueError for a shard without rows."""
        if self._rows:
            self._write_group()
        if self._writer is None:
            raise ValueError(f"{self.folder}: a shard without rows")
        self._writer.close()
        self._partial.replace(self.folder / "metadata.parquet")

    @property
    def _partial(self) -> Path:
        return self.folder / "metadata.parquet.partial"

    def _write_group(self) -> None:
        import pyarrow.parquet as pq

        table = with_file_names(to_table(self._rows, self.schema, self.name), self._files)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._partial, table.schema, write_page_checksum=True)
        self._writer.write_table(table)
        self._rows, self._files = [], []


def with_file_names(table: pa.Table, files: list[str]) -> pa.Table:
    """The picture's column becomes the one from which ImageFolder makes a column of the picture's name.

    `file_name` gives `image`, `shot_file_name` gives `shot`.
    """
    import pyarrow as pa

    picture = picture_column(table.schema)
    place = table.schema.names.index(picture)
    table = table.set_column(place, pa.field(file_column(picture), pa.string()), pa.array(files))
    return table.replace_schema_metadata({b"batchsd": table.schema.metadata[b"batchsd"]})


def file_column(picture: str) -> str:
    """The column of file names that ImageFolder turns into a column `picture`."""
    return "file_name" if picture == "image" else f"{picture}_file_name"
