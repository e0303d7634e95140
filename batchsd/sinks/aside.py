"""Failed rows in a table of their own: `failed/<name>.parquet`, with the run's schema, beside any sink's files.

Layouts that hold one sample a picture have no place for a row without one. A shard in which nothing failed has
no such table, and one in which all failed nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from batchsd.sinks.parquet import ParquetShard
from batchsd.types import Record, Sink, SinkWriter

if TYPE_CHECKING:
    import pyarrow as pa

FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Aside:
    """Gives `inner` the rows that have a picture, and writes the others to `failed/`."""

    inner: Sink

    def open(self, folder: Path, name: str, schema: pa.Schema) -> AsideShard:
        return AsideShard(self.inner, folder, name, schema)


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
