"""Rows of a published shard, read back: a shard that is built anew keeps the pictures that are still right.

A picture is kept, to the byte, where its row was ok and its `row_hash` is that of the row as it is asked now.
Every built-in layout reads back; rows that were put aside come back to their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, runtime_checkable

from batchsd.columns import MANIFEST, ON_REQUEST, OURS
from batchsd.ledger import place_of
from batchsd.store import Store
from batchsd.types import Record, Request, Shard, Sink
from batchsd.values import Wanted, remembered

if TYPE_CHECKING:
    import pyarrow as pa

OpenFile = Callable[[str], BinaryIO | None]
"""A published file by its name in the marker; None where there is none."""


@runtime_checkable
class Rereads(Protocol):
    """A sink whose files can be read back. Of other sinks a revision redraws whole shards."""

    def reread(
        self, open_file: OpenFile, name: str, schema: pa.Schema, pictures: Wanted
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The rows of shard `name` in order: their numbers within it, and their values by the columns of `schema`.

        A layout may leave out what it does not hold, give more than was asked, and hold values as JSON has them. The
        picture's value is `{"bytes", "path"}`; its bytes may be left out of rows that `pictures` does not want.
        """
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """What a published row says of itself, by our names, and its manifest columns as they travelled."""

    ours: Mapping[str, Any]
    travelled: Mapping[str, Any]

    def fits(self, request: Request) -> bool:
        """Whether it is what `request` asks for: drawn well, or drawn and rejected by filters that are the plan's."""
        wanted, drawn = request.row_hash, self.ours["status"] in ("ok", "rejected")
        return drawn and request.error is None and self.ours["row_hash"] == wanted != ""

    def record(self, request: Request) -> Record:
        """The same picture, for a row that asks for the same pixels."""
        ours = self.ours
        image = ours["image"] or {"bytes": None, "path": "x.png"}
        _, _, extension = image["path"].rpartition(".")
        made = {name: ours[name]["bytes"] for name in ON_REQUEST if ours.get(name)}
        size = {"height": ours["height"], "width": ours["width"]}
        found = {"image": image["bytes"], "extension": extension, "made": made, "tokens_cut": ours["tokens_cut"]}
        return Record(request, ours["status"], ours.get("error"), **found, **size, **remembered(ours))


def reread(store: Store, sink: Sink, shard: Shard, schema: pa.Schema, pictures: Wanted) -> Iterator[Row]:
    """The published rows of a shard, in order; none of a sink that does not read back.

    `schema` is the run's, or those columns of it that are wanted, the picture's among them. A shard that lost rows
    ends where the first one is missing.
    """
    if not isinstance(sink, Rereads):
        return
    ours = {f.name: f.metadata[OURS].decode() for f in schema if OURS in f.metadata}
    travelled = {f.name: f.metadata[MANIFEST].decode() for f in schema if MANIFEST in f.metadata}
    rows = sink.reread(lambda name: store.open(place_of(name)), shard.name, schema, pictures)
    for place, (index, values) in enumerate(rows):
        if index != place:
            return
        yield Row(
            {ours[name]: value for name, value in values.items() if name in ours},
            {travelled[name]: value for name, value in values.items() if name in travelled},
        )
