"""A worker's whole life: one loop over a stream of shards, the same in this process and in a Ray actor.

    tickets -> rows -> engine -> records -> back into row order -> sink, in staging -> checked -> ShardResult

At most two shards are open: the engine draws the first rows of the next while the last of this one finish.
"""

from __future__ import annotations

import hashlib
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from batchsd.ledger import staging_folder
from batchsd.order import RowOrder
from batchsd.published import reread
from batchsd.store import Store
from batchsd.types import (
    BatchsdError,
    Event,
    OutputFile,
    Progress,
    Record,
    Records,
    Request,
    Shard,
    ShardResult,
    Sink,
)

if TYPE_CHECKING:
    import pyarrow as pa

OPEN_SHARDS = 2

Source = tuple[Shard, Iterator[Request]]
Generate = Callable[[Iterable[Source | None]], Records]
"""The engine: shards with their rows in, records out as they finish. None = nothing at hand just now."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One attempt at a shard. The nonce names its staging folder, which no other attempt ever uses.

    From revision 1 on the shard is published already: rows that are still right keep their pictures.
    """

    shard: Shard
    nonce: str
    revision: int = 0


class Drained(Exception):
    """There are no tickets left, and none will come."""


Take = Callable[[bool], Ticket | None]
"""`take(wait)`: the next ticket, or None where none is at hand and it may not wait. At the end: Drained."""


@dataclass(frozen=True)
class Workbench:
    """All that a worker holds for its whole life. `hook` calls the plugins' watchers.

    `lap` gives the engine's figures since it was last asked: they go into the marker, never into the files.
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


def work(bench: Workbench, take: Take, announce: Callable[[Event], None]) -> Iterator[Event]:
    """Draw the shards of the tickets; yield a Progress for each record and a ShardResult for each shard.

    `announce` is called from within the engine's pull: before a row is drawn, so that its key has gone out
    should it kill this process; and with all that has to do with rows that need not be drawn.
    """
    writers: dict[Shard, ShardWriter] = {}

    def add(shard: Shard, record: Record) -> Iterator[Event]:
        progress = writers[shard].add(record)
        if bench.hook:
            bench.hook.batch_done(progress=progress)
        yield progress
        if writers[shard].full:
            result = writers.pop(shard).close()
            if bench.hook:
                bench.hook.shard_done(shard=shard, result=result)
            yield result

    def rows(writer: ShardWriter) -> Iterator[Request]:
        count = 0
        published = reread(bench.store, bench.sink, writer.shard, bench.schema, True) if writer.revises else iter(())
        for request in bench.read(writer.shard):
            count += 1
            if count > writer.rows:
                break
            before = next(published, None)
            if before is not None and before.fits(request):
                for event in add(writer.shard, before.record(request)):
                    announce(event)
                continue
            announce(writer.asked(request))
            yield request
        if count != writer.rows:
            raise RuntimeError(f"{writer.shard.name}: {count} rows read, {writer.rows} planned")

    def sources() -> Iterator[Source | None]:
        while True:
            if len(writers) >= OPEN_SHARDS:
                yield None
                continue
            try:
                ticket = take(not writers)  # with a shard open the engine has work: it must not wait here
            except Drained:
                return
            if ticket is None:
                yield None
                continue
            writer = writers[ticket.shard] = ShardWriter(bench, ticket)
            if bench.hook:
                bench.hook.shard_started(shard=ticket.shard)
            yield ticket.shard, rows(writer)

    records = bench.generate(sources())
    try:
        for shard, record in records:
            yield from add(shard, record)
    finally:
        if hasattr(records, "close"):  # a generator: ends its threads now, not when it is collected
            records.close()
    if writers:
        raise RuntimeError(f"the engine ended with rows missing: {', '.join(s.name for s in writers)}")


class ShardWriter:
    """One open shard: which rows were asked, which came, and the files that the sink builds of them."""

    def __init__(self, bench: Workbench, ticket: Ticket) -> None:
        self.shard = ticket.shard
        self.rows = ticket.shard.count * bench.repeat
        self.revises = ticket.revision > 0
        self._bench = bench
        self._nonce = ticket.nonce
        self._staging = staging_folder(ticket.shard, ticket.nonce)
        self._folder = bench.store.scratch(self._staging)
        self._sink = bench.sink.open(self._folder, ticket.shard.name, bench.schema)
        self._order = RowOrder()
        self._in_flight: dict[int, str] = {}
        self._ok = 0
        self._failed: Counter[str] = Counter()
        self._started = time.time()

    @property
    def full(self) -> bool:
        return self._ok + self._failed.total() == self.rows

    def asked(self, request: Request) -> Progress:
        """The engine has taken this row."""
        self._in_flight[request.index] = request.key
        return self._progress(0, 0)

    def add(self, record: Record) -> Progress:
        self._in_flight.pop(record.request.index, None)
        for due in self._order.put(record):
            self._sink.add(due)
        ok = record.status == "ok"
        if ok:
            self._ok += 1
        else:
            self._failed[record.status] += 1
        return self._progress(int(ok), int(not ok))

    def close(self) -> ShardResult:
        """Finish the files, look at them again as a reader would, and make them durable in staging."""
        self._sink.close()
        self._order.close()
        files = check_staged(self._folder, self.rows)
        self._bench.store.hand_in(self._staging)
        return ShardResult(
            shard=self.shard,
            nonce=self._nonce,
            rows=self.rows,
            ok=self._ok,
            failed=dict(self._failed),
            files=files,
            facts=self._bench.facts,
            timings={
                "started": round(self._started, 3),
                "seconds": round(time.time() - self._started, 3),
                **self._bench.lap(),
            },
        )

    def _progress(self, ok: int, failed: int) -> Progress:
        return Progress(self.shard, ok, failed, tuple(self._in_flight.values()))


def check_staged(folder: Path, rows: int) -> tuple[OutputFile, ...]:
    """The files that a sink left, hashed from disk.

    Where all are Parquet tables they must hold `rows` together; where some are, no more than that.
    """
    import pyarrow.parquet as pq

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    tables = [path for path in paths if path.suffix == ".parquet"]
    written = sum(pq.read_metadata(path).num_rows for path in tables)
    if not paths or written > rows or (tables == paths and written != rows):
        raise RuntimeError(f"{folder}: the sink left {len(paths)} files with {written} rows, not {rows}")
    return tuple(
        OutputFile(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_of(path))
        for path in paths
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Dispatcher(Protocol):
    """The driver, as executors see it: gives tickets out, takes events in. `worker` counts from 0."""

    def take(self, worker: int) -> Ticket | None:
        """The next ticket for this worker; None where there is none just now."""
        ...

    def handle(self, worker: int, event: Event) -> None:
        """An event of that worker; a ShardResult is committed before this returns."""
        ...

    def lost(self, worker: int, cause: str, log: str) -> None:
        """That worker is no more: its tickets go to others. Raises where a shard was tried too often.

        `cause` is one line for people, `log` all that is known.
        """
        ...

    def tick(self) -> None:
        """To be called often: reports, and raises where the run must stop at once."""
        ...

    @property
    def over(self) -> bool:
        """Nothing is left to give out, and nothing is out."""
        ...


class Executor(Protocol):
    """Where workers live. `run` returns when the dispatcher is over; whatever it raised passes through."""

    workers: int

    def run(self, dispatcher: Dispatcher) -> None: ...


class InProcess:
    """One worker, here: no start-up, the same protocol. `build` makes the workbench."""

    workers = 1

    def __init__(self, build: Callable[[], Workbench]) -> None:
        self.build = build

    def run(self, dispatcher: Dispatcher) -> None:
        while not dispatcher.over:
            with closing(self._events(dispatcher)) as events:
                while True:
                    try:
                        event = next(events, None)
                    except BatchsdError:
                        raise
                    except Exception as error:  # as if this worker had died: whatever it held is tried again
                        dispatcher.lost(0, describe(error), traceback.format_exc())
                        break
                    if event is None:
                        break
                    dispatcher.handle(0, event)
                    dispatcher.tick()

    def _events(self, dispatcher: Dispatcher) -> Generator[Event]:
        def take(wait: bool) -> Ticket:
            ticket = dispatcher.take(0)
            if ticket is None:
                raise Drained
            return ticket

        yield from work(self.build(), take, lambda event: dispatcher.handle(0, event))


def describe(error: BaseException) -> str:
    """An unexpected error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
