"""Failed rows in a table of their own: `failed/<name>.parquet`, with the run's schema, beside any sink's files.

Layouts that hold one sample a picture have no place for a row without one. A shard in which nothing failed has
no such table, and one in which all failed nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsd.sinks.parquet import OpenFile, ParquetShard, read_rows
from batchsd.types import Record, Sink, SinkWriter
from batchsd.values import Wanted

if TYPE_CHECKING:
    import pyarrow as pa

FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Aside:
    """Gives `inner` the rows that have a picture, and writes the others to `failed/`."""

    inner: Sink

    def open(self, folder: Path, name: str, schema: pa.Schema) -> AsideShard:
        return AsideShard(self.inner, folder, name, schema)

    def reread(
        self, open_file: OpenFile, name: str, schema: pa.Schema, pictures: Wanted
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Both again as one (see `published.Rereads`): failed rows fill the gaps between the others."""
        if not hasattr(self.inner, "reread"):
            return
        good = self.inner.reread(open_file, name, schema, pictures)
        failed = read_rows(open_file, f"{FAILED}/{name}.parquet", schema.names)
        following = next(good, None)
        for index in count():
            if following is not None and following[0] == index:
                yield following
                following = next(good, None)
            elif (row := next(failed, None)) is not None:
                yield index, row
            else:
                return


@dataclass(slots=True)
class AsideShard:
    """One shard: each of the two writers is opened with its first row."""

    inner: Sink
    folder: Path
    name: str
    schema: pa.Schema
    _good: SinkWriter | None = field(default=None, init=False)
    _failed: SinkWriter | None = field(default=None, init=False)

    def add(self, record: Record) -> None:
        if record.image is not None:
            if self._good is None:
                self._good = self.inner.open(self.folder, self.name, self.schema)
            self._good.add(record)
            return
        if self._failed is None:
            (self.folder / FAILED).mkdir(exist_ok=True)
            self._failed = ParquetShard(self.folder / FAILED, self.name, self.schema)
        self._failed.add(record)

    def close(self) -> None:
        """Finish both. ValueError for a shard without rows."""
        writers = [writer for writer in (self._good, self._failed) if writer is not None]
        if not writers:
            raise ValueError(f"{self.folder}/{self.name}: a shard without rows")
        for writer in writers:
            writer.close()
