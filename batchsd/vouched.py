"""A plugin's sink, watched: what it raises or leaves undone ends the job with one line that names it.

Errors of the storage pass as they are, and are tried again: an OSError with a number, as the system gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsd.plugin_source import cause
from batchsd.types import BatchsdError, Record, Sink, SinkWriter, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

ANY_SHARD = re.compile(r"(failed/)?\w+-\d{5}-of-\d{5}")  # others may be open in the same folder


@dataclass(frozen=True, slots=True)
class Vouched:
    """`inner`, which the plugin `owner` registered as `name`."""

    inner: Sink
    name: str
    owner: str

    def open(self, folder: Path, name: str, schema: pa.Schema) -> VouchedShard:
        with self.watched("open"):
            writer = self.inner.open(folder, name, schema)
        missing = [method for method in ("add", "close") if not callable(getattr(writer, method, None))]
        if missing:
            raise self.fault(f"open gave a {type(writer).__name__} without {' and '.join(missing)}")
        return VouchedShard(writer, self, folder, name)

    def reread(self, *published: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """What the inner sink reads back, if it does (see `published.Rereads`)."""
        return self.inner.reread(*published) if hasattr(self.inner, "reread") else iter(())

    def fault(self, what: str) -> UsageError:
        return UsageError(f"sink {self.name!r} (plugin {self.owner!r}): {what}; batchsd.testing.check_sink tries it")

    @contextmanager
    def watched(self, method: str) -> Iterator[None]:
        try:
            yield
        except BatchsdError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise self.fault(f"{method} failed: {cause(error)}") from error


@dataclass(frozen=True, slots=True)
class VouchedShard:
    inner: SinkWriter
    sink: Vouched
    folder: Path
    name: str

    def add(self, record: Record) -> None:
        with self.sink.watched("add"):
            self.inner.add(record)

    def close(self) -> None:
        """Finish the shard's files: there must be some, under names that no other shard's files can have."""
        with self.sink.watched("close"):
            self.inner.close()
        files = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        if not any(file.startswith(self.name) for file in files):
            raise self.sink.fault(f"close left no file whose name begins with the shard's, {self.name}")
        for file in files:
            if not ANY_SHARD.match(file):
                raise self.sink.fault(f"left {file}; a shard's files begin with its name, {self.name}")
