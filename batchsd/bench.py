"""What a worker is given: a workbench, once, for its whole life; then orders, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchsd.store import Store
from batchsd.types import Records, Request, Shard, Sink

if TYPE_CHECKING:
    import pyarrow as pa

Source = tuple[Shard, Iterator[Request]]
Generate = Callable[[Iterable[Source | None]], Records]
"""The engine: shards with their rows in, records out as they finish. None = nothing at hand just now."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One attempt at a shard. The nonce names its staging folder, which no other attempt ever uses.

    From revision 1 on the shard is published already: rows that are still right keep their pictures. `condemned`
    rows are not drawn: their status and error are given. `alone`: one row at a time.
    """

    shard: Shard
    nonce: str
    revision: int = 0
    condemned: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Trial:
    """One row of a shard, to be drawn alone, to see whether its worker lives through it. Nothing is written."""

    shard: Shard
    row: int


Order = Ticket | Trial


class Drained(Exception):
    """There are no orders left, and none will come."""


Take = Callable[[bool], Order | None]
"""`take(wait)`: the next order, or None where none is at hand and it may not wait. At the end: Drained.

A Trial comes only where nothing else is in hand.
"""


@dataclass(frozen=True)
class Workbench:
    """All that a worker holds for its whole life. `hook` calls the plugins' watchers.

    `lap` gives the engine's figures since it was last asked: they go into the marker, never into the files.
    `beat` gives a number that grows while the engine works; it is asked from another thread.
    """

    generate: Generate
    read: Callable[[Shard], Iterator[Request]]
    repeat: int
    sink: Sink
    schema: pa.Schema
    store: Store
    hook: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    lap: Callable[[], Mapping[str, float]] = dict
    beat: Callable[[], int] = int
