"""A worker's whole life: one loop over a stream of shards, the same in this process and in a Ray actor.

    tickets -> rows -> engine -> records -> back into row order -> sink, in staging -> checked -> ShardResult

At most two shards are open: the engine draws the first rows of the next while the last of this one finish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from batchsd.bench import Drained, Source, Take, Ticket, Trial, Workbench
from batchsd.published import reread
from batchsd.types import Event, Progress, Record, Request, Shard, Tried
from batchsd.writer import Shapes, ShardWriter

OPEN_SHARDS = 2


def work(bench: Workbench, take: Take, announce: Callable[[Event], None]) -> Iterator[Event]:
    """Draw the shards of the tickets; yield a Progress for each record and a ShardResult for each shard.

    `announce` is called from within the engine's pull: before a row is drawn, so that its key has gone out
    should it kill this process; and with all that has to do with rows that need not be drawn.
    """
    return Work(bench, take, announce).run()


class Work:
    """The loop of `work`: `_sources` is what the engine pulls, `run` what the driver is told."""

    def __init__(self, bench: Workbench, take: Take, announce: Callable[[Event], None]) -> None:
        self._bench, self._take, self._announce = bench, take, announce
        self._writers: dict[Shard, ShardWriter] = {}
        self._trial: Trial | None = None
        self._shapes = Shapes()

    def run(self) -> Iterator[Event]:
        records = self._bench.generate(self._sources())
        try:
            for shard, record in records:
                self._shapes.drawn(record.request)
                if self._trial is not None and shard == self._trial.shard:
                    tried, self._trial = Tried(shard, self._trial.row, record.status == "ok"), None
                    yield tried
                else:
                    yield from self._add(shard, record)
        except Exception:
            for writer in self._writers.values():
                writer.abandon()
            raise
        finally:
            if hasattr(records, "close"):  # a generator: ends its threads now, not when it is collected
                records.close()
        if self._writers:
            raise RuntimeError(f"the engine ended with rows missing: {', '.join(s.name for s in self._writers)}")

    def _sources(self) -> Iterator[Source | None]:
        while True:
            if self._trial is not None or len(self._writers) >= OPEN_SHARDS:
                yield None
                continue
            try:
                order = self._take(not self._writers)  # with a shard open the engine has work: it must not wait here
            except Drained:
                return
            if order is None:
                yield None
            elif isinstance(order, Trial):
                self._trial = order
                yield order.shard, self._one_row(order)
            else:
                yield from self._shard(order)

    def _shard(self, ticket: Ticket) -> Iterator[Source | None]:
        writer = self._writers[ticket.shard] = ShardWriter(self._bench, ticket, self._shapes)
        if self._bench.hook:
            self._bench.hook.shard_started(shard=ticket.shard)
        if not ticket.alone:
            yield ticket.shard, self._rows(writer)
            return
        for request in self._rows(writer):
            while any(other.in_flight for other in self._writers.values() if other is not writer):
                yield None
            yield ticket.shard, iter([request])
            while writer.in_flight:
                yield None

    def _rows(self, writer: ShardWriter) -> Iterator[Request]:
        count, bench, shard = 0, self._bench, writer.shard
        published = reread(bench.store, bench.sink, shard, bench.schema, True) if writer.ticket.revision else iter(())
        for request in bench.read(shard):
            count += 1
            if count > writer.rows:
                break
            before, verdict = next(published, None), writer.ticket.condemned.get(request.index)
            if before is not None and before.fits(request):
                known = before.record(request)
            elif verdict is not None and request.error is None:
                known = Record(request, *verdict)
            else:
                self._announce(writer.asked(request))
                yield request
                continue
            for event in self._add(shard, known, drawn=False):
                self._announce(event)
        if count != writer.rows:
            raise RuntimeError(f"{shard.name}: {count} rows read, {writer.rows} planned")

    def _one_row(self, trial: Trial) -> Iterator[Request]:
        shard, repeat = trial.shard, self._bench.repeat
        alone = replace(shard, start=shard.start + trial.row // repeat, count=1)
        request = replace(list(self._bench.read(alone))[trial.row % repeat], index=trial.row)
        self._shapes.asked(request)
        self._announce(Progress(shard, 0, 0, (request.key,), (trial.row,), long=self._shapes.new))
        yield request

    def _add(self, shard: Shard, record: Record, drawn: bool = True) -> Iterator[Event]:
        writer, hook = self._writers[shard], self._bench.hook
        progress = writer.add(record, drawn)
        if hook:
            hook.batch_done(progress=progress)
        yield progress
        if writer.full:
            yield writer.closing()
            result = writer.close()
            del self._writers[shard]
            if hook:
                hook.shard_done(shard=shard, result=result)
            yield result
