"""One open shard of a worker: records into row order, through the sink, into staging, and looked at again.

A disk that fails or is full is never a row's fault: it ends the attempt as an InfrastructureError.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchsd.bench import Ticket, Workbench
from batchsd.ledger import staging_folder
from batchsd.order import RowOrder
from batchsd.scratch import disk_trouble
from batchsd.types import OutputFile, Progress, Record, Request, ShardResult


class Shapes:
    """Which shapes of rows this worker has drawn: the first batch of one may take long."""

    def __init__(self) -> None:
        self._known: set[tuple[Any, ...]] = set()
        self._asked: Counter[tuple[Any, ...]] = Counter()

    def asked(self, request: Request) -> None:
        self._asked[self._shape(request)] += 1

    def drawn(self, request: Request) -> None:
        shape = self._shape(request)
        self._known.add(shape)
        self._asked[shape] -= 1
        if self._asked[shape] <= 0:
            del self._asked[shape]

    @property
    def new(self) -> bool:
        """Whether a row in flight is of a shape that was never drawn here."""
        return not self._known.issuperset(self._asked)

    @staticmethod
    def _shape(request: Request) -> tuple[Any, ...]:
        return request.height, request.width, request.task


class ShardWriter:
    """One open shard: which rows were asked, which came, and the files that the sink builds of them."""

    def __init__(self, bench: Workbench, ticket: Ticket, shapes: Shapes) -> None:
        self.shard = ticket.shard
        self.ticket = ticket
        self.rows = ticket.shard.count * bench.repeat
        self.in_flight: dict[int, str] = {}
        self._bench = bench
        self._shapes = shapes
        self._staging = staging_folder(ticket.shard, ticket.nonce)
        self._folder = bench.store.scratch(self._staging)
        with storage(self._folder):
            self._sink = bench.sink.open(self._folder, ticket.shard.name, bench.schema)
            self._order = RowOrder()
        self._ok = 0
        self._failed: Counter[str] = Counter()
        self._started = time.time()

    @property
    def full(self) -> bool:
        return self._ok + self._failed.total() == self.rows

    def asked(self, request: Request) -> Progress:
        """The engine has taken this row."""
        self.in_flight[request.index] = request.key
        self._shapes.asked(request)
        return self._progress(0, 0)

    def add(self, record: Record, drawn: bool = True) -> Progress:
        """A row is finished: `drawn` here, or known before."""
        index, ok, drawn_well = record.request.index, record.status == "ok", record.status in ("ok", "rejected")
        self.in_flight.pop(index, None)
        with storage(self._folder):
            for due in self._order.put(record):
                self._sink.add(due)
        if ok:
            self._ok += 1
        else:
            self._failed[record.status] += 1
        return self._progress(int(drawn_well), int(not drawn_well), index if ok and drawn else -1)

    def closing(self) -> Progress:
        """All rows are there; what comes now, writing and handing in, may take its time."""
        return replace(self._progress(0, 0), long=True)

    def close(self) -> ShardResult:
        """Finish the files, look at them again as a reader would, and make them durable in staging."""
        with storage(self._folder):
            self._sink.close()
            self._order.close()
            files = check_staged(self._folder, self.rows)
        self._bench.store.hand_in(self._staging)
        return ShardResult(
            shard=self.shard,
            nonce=self.ticket.nonce,
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

    def abandon(self) -> None:
        """Give the room on the disk back; nobody will ask for these files."""
        self._order.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _progress(self, ok: int, failed: int, good: int = -1) -> Progress:
        keys, rows = tuple(self.in_flight.values()), tuple(self.in_flight)
        return Progress(self.shard, ok, failed, keys, rows, good, self._shapes.new)


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


@contextmanager
def storage(folder: Path) -> Iterator[None]:
    """The disk's errors as InfrastructureError; Pillow's, which are OSErrors without a number, as they are."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        with disk_trouble(folder):
            raise
