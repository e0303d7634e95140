"""Rows of a published shard, read back: a shard that is built anew keeps the pictures that are still right.

A picture is kept, to the byte, where its row was ok and its `row_hash` is that of the row as it is asked now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, runtime_checkable

from batchsd.columns import MANIFEST, OURS
from batchsd.ledger import DATA
from batchsd.provenance import Told
from batchsd.store import Store
from batchsd.types import Record, Request, Shard, Sink

if TYPE_CHECKING:
    import pyarrow as pa


@runtime_checkable
class Rereads(Protocol):
    """A sink whose files can be read back. Of other sinks a revision redraws whole shards."""

    def reread(self, open_file: Callable[[str], BinaryIO], name: str, pictures: bool) -> Iterator[pa.Table]:
        """The rows of shard `name` in order, in tables of the run's schema; image columns where asked for.

        `open_file` opens a published file by its name below `data/`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """What a published row says of itself, by our names, and its manifest columns as they travelled."""

    ours: dict[str, Any]
    travelled: dict[str, Any]

    def fits(self, request: Request) -> bool:
        """Whether it is what `request` asks for, drawn well."""
        wanted = request.row_hash
        return self.ours["status"] == "ok" and request.error is None and self.ours["row_hash"] == wanted != ""

    def record(self, request: Request) -> Record:
        """The same picture, for a row that asks for the same pixels."""
        image, ours = self.ours["image"], self.ours
        _, _, extension = image["path"].rpartition(".")
        size = {"height": ours["height"], "width": ours["width"]}
        return Record(request, "ok", image=image["bytes"], extension=extension, **size)


def reread(store: Store, sink: Sink, shard: Shard, pictures: bool) -> Iterator[Row]:
    """The published rows of a shard, in order; none of a sink that does not read back."""
    if isinstance(sink, Told):
        sink = sink.inner
    if not isinstance(sink, Rereads):
        return
    for table in sink.reread(lambda name: store.open(f"{DATA}/{name}"), shard.name, pictures):
        ours, travelled = {}, {}
        for field, column in zip(table.schema, table.columns, strict=True):
            if OURS in field.metadata:
                ours[field.metadata[OURS].decode()] = column.to_pylist()
            else:
                travelled[field.metadata[MANIFEST].decode()] = column.to_pylist()
        for i in range(table.num_rows):
            yield Row(
                {name: values[i] for name, values in ours.items()},
                {name: values[i] for name, values in travelled.items()},
            )
