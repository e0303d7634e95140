"""One shard becomes one Parquet file, laid out for `datasets`: people see pictures at once.

Image bytes are compressed already, so their column is stored plain; the rest is snappy with dictionaries.
Row groups of 100 rows make a picture cheap to find; the same records give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from batchsd.columns import IMAGE_TYPE, picture_column, to_table
from batchsd.types import Record
from batchsd.values import Wanted, row_index, wants

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

OpenFile = Callable[[str], BinaryIO | None]  # a published file by its name; None where there is none
GROUP_ROWS = 100  # as `datasets` writes pictures
GROUP_BYTES = 100 * 2**20  # Hub viewers fail above 286 MiB


@dataclass(frozen=True, slots=True)
class ParquetSink:
    """Writes `<folder>/<name>.parquet`."""

    def open(self, folder: Path, name: str, schema: pa.Schema) -> ParquetShard:
        return ParquetShard(folder, name, schema)

    def reread(
        self, open_file: OpenFile, name: str, schema: pa.Schema, pictures: Wanted
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """A published shard again (see `published.Rereads`); pictures know their rows, where others lie apart."""
        picture = picture_column(schema)
        for place, row in enumerate(read_rows(open_file, f"{name}.parquet", schema.names, picture, pictures)):
            yield row_index(row[picture]["path"]) if row[picture] else place, row


@dataclass(slots=True)
class ParquetShard:
    """A shard being written, at most one row group of records in memory.

    The file bears another name until `close`: pyarrow finishes a writer that is thrown away, and a short file
    that reads well must not pass for the whole shard.
    """

    folder: Path
    name: str
    schema: pa.Schema
    _rows: list[Record] = field(default_factory=list, init=False)
    _bytes: int = field(default=0, init=False)
    _writer: pq.ParquetWriter | None = field(default=None, init=False)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.parquet"

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.name}.parquet.partial"

    def add(self, record: Record) -> None:
        size = len(record.image or b"")
        if self._rows and (len(self._rows) == GROUP_ROWS or self._bytes + size > GROUP_BYTES):
            self._write_group()
        self._rows.append(record)
        self._bytes += size

    def close(self) -> None:
        """Finish the file, put it on the disk, and give it its name. ValueError for a shard without rows."""
        if self._rows:
            self._write_group()
        if self._writer is None:
            raise ValueError(f"{self.path}: a shard without rows; `datasets` cannot read an empty file")
        self._writer.close()
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
        self.partial.replace(self.path)

    def _write_group(self) -> None:
        if self._writer is None:
            self._writer = open_writer(self.partial, self.schema)
        table = to_table(self._rows, self.schema, self.name)
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._rows, self._bytes = [], 0


def open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer that stores picture columns plain and the rest snappy with dictionaries."""
    import pyarrow.parquet as pq

    plain, packed = leaf_columns(schema)
    return pq.ParquetWriter(
        path,
        schema,
        compression=dict.fromkeys(plain, "none") | dict.fromkeys(packed, "snappy"),
        use_dictionary=packed,
        column_encoding=dict.fromkeys(plain, "PLAIN"),
        write_page_index=True,
        write_page_checksum=True,
    )


@lru_cache(maxsize=8)
def leaf_columns(schema: pa.Schema) -> tuple[list[str], list[str]]:
    """The Parquet paths (`image.bytes`, `tags.list.element`) of the picture columns, and of all others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Parquet's own naming of nested columns, asked from an empty file rather than written down again.
    buffer = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), buffer)
    columns = pq.ParquetFile(buffer.getvalue()).schema
    paths = [columns.column(i).path for i in range(len(columns))]
    pictures = tuple(f"{field.name}." for field in schema if field.type == IMAGE_TYPE)
    plain = [path for path in paths if path.startswith(pictures)]
    return plain, [path for path in paths if path not in plain]


def read_rows(
    open_file: OpenFile, name: str, columns: Collection[str], picture: str = "", pictures: Wanted = True
) -> Iterator[dict[str, Any]]:
    """Those of `columns` that a table has, row by row, read a row group at a time; none where there is no table.

    Of the column `picture` the bytes are read only in row groups that hold a row which `pictures` wants.
    """
    import pyarrow.parquet as pq

    file = open_file(name)
    if file is None:
        return
    with file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        whole = [name for name in parquet.schema_arrow.names if name in columns]
        lean = [f"{name}.path" if name == picture else name for name in whole]
        place = 0
        for group in range(parquet.metadata.num_row_groups):
            bytes_too = isinstance(pictures, bool) and pictures
            if not isinstance(pictures, bool):
                paths = parquet.read_row_group(group, columns=[f"{picture}.path"])[picture].to_pylist()
                rows = (row_index(cell["path"]) if cell else place + i for i, cell in enumerate(paths))
                bytes_too = any(wants(pictures, row) for row in rows)
            yield from parquet.read_row_group(group, columns=whole if bytes_too else lean).to_pylist()
            place += parquet.metadata.row_group(group).num_rows
