"""A whole worker without a model: rows, an engine and a sink small enough to see through.

Everything is at module level, so that Ray can carry it to its actors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchsd.bench import Generate, Source, Workbench
from batchsd.drive import drive
from batchsd.executor import Executor, InProcess
from batchsd.ledger import Ledger, Tally
from batchsd.plan import Plan
from batchsd.stop import Stop
from batchsd.store import LocalStore, Store
from batchsd.types import Record, Request, Shard, Sink

SCHEMA = pa.schema([("key", pa.string()), ("image", pa.binary()), ("status", pa.string())])
NOTHING = pa.table({})


def shards_of(shards: int, rows: int) -> list[Shard]:
    return [Shard(1, i, shards, 0, i * rows, rows) for i in range(shards)]


def plan_of(shards: Sequence[Shard], **hard: object) -> Plan:
    rows = sum(shard.count for shard in shards)
    file = {"name": "prompts.parquet", "size": 1, "sha256": "00", "rows": rows}
    schema = {field.name: str(field.type) for field in SCHEMA}
    facts = {"sampler.steps": 20, **hard}
    return Plan(1, facts, {}, (file,), rows, shards[0].count, 1, len(shards), "fake", schema)


def read_rows(shard: Shard) -> Iterator[Request]:
    for index in range(shard.count):
        key = f"row{shard.start + index}"
        yield Request(
            key, index, 0, key, None, shard.start + index, 20, 5.0, 8, 8, "euler", "text", {}, NOTHING
        )


def picture(request: Request) -> bytes:
    return f"picture of {request.key}".encode()


def draw(request: Request) -> Record:
    return Record(request, "ok", image=picture(request))


def lanes(
    sources: Iterable[Source | None],
    width: int = 4,
    seconds: float = 0.0,
    record: Callable[[Request], Record] = draw,
) -> Iterator[tuple[Shard, Record]]:
    """An engine that keeps `width` rows in flight, also across shards; newest and oldest finish in turn."""
    stream = iter(sources)
    held: list[tuple[Shard, Request]] = []
    reading: tuple[Shard, Iterator[Request]] | None = None
    more, turn = True, 0
    while more or reading or held:
        while len(held) < width and (reading or more):
            if reading is None:
                try:
                    reading = next(stream)
                except StopIteration:
                    more = False
                    break
                if reading is None:
                    break
            request = next(reading[1], None)
            if request is None:
                reading = None
            else:
                held.append((reading[0], request))
        if held:
            time.sleep(seconds)
            shard, request = held.pop(0 if turn % 2 else -1)
            turn += 1
            yield shard, record(request)


class FakeSink:
    """One Parquet file a shard."""

    def open(self, folder: Path, name: str, schema: pa.Schema) -> FakeWriter:
        return FakeWriter(folder / f"{name}.parquet", schema)


class FakeWriter:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self.rows: list[dict[str, object]] = []

    def add(self, record: Record) -> None:
        self.rows.append({"key": record.request.key, "image": record.image, "status": record.status})

    def close(self) -> None:
        pq.write_table(pa.Table.from_pylist(self.rows, self.schema), self.path)


def workbench(store: Store, generate: Generate = lanes, sink: Sink | None = None) -> Workbench:
    return Workbench(generate, read_rows, 1, sink or FakeSink(), SCHEMA, store, facts={"device": "fake"})


def run_all(
    store: LocalStore,
    shards: Sequence[Shard],
    generate: Generate = lanes,
    executor: Executor | None = None,
    stop: Stop | None = None,
    max_failed: float = 0,
    plan: Plan | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Tally:
    """What `batchsd run` does, with the fakes."""
    ledger = Ledger(store)
    plan = ledger.begin(plan or plan_of(shards))
    executor = executor or InProcess(partial(workbench, store, generate))
    stop = stop or Stop(grace=5)
    tally = ledger.roll_forward()
    return drive(ledger, plan, tally, shards, executor, stop, max_failed, lambda snapshot: None, log)


def published(root: Path) -> list[tuple[str, bytes]]:
    """Every row in `data/`, in the order that a reader of the folder meets them."""
    files = sorted((root / "data").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return [(row["key"], row["image"]) for row in rows]


def expected(shards: Sequence[Shard]) -> list[tuple[str, bytes]]:
    return [(request.key, picture(request)) for shard in shards for request in read_rows(shard)]
