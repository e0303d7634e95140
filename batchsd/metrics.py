"""Figures of a run for Prometheus, through `ray.util.metrics`: of what the driver is told anyway, nothing more is sent.

    workers' events -> Watched -> the dispatcher
                          |-> counters and gauges -> the metrics port of the driver's node

Only on Ray, which puts `ray_` before each name. Who serves them is Ray's agent (extra `cluster`); without it they go
nowhere, and nothing else changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, Protocol

from batchsd.bench import Order, Ticket
from batchsd.executor import Dispatcher, Executor, Loss
from batchsd.progress import Snapshot
from batchsd.types import Event, Progress, ShardResult

GAUGES_EVERY = 2.0  # seconds
SECONDS = [1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0]  # a shard aims at one to five minutes


@dataclass(frozen=True)
class Metric:
    """What it counts, and the label that it has besides `run` ("": none). Labels have a handful of values each."""

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    label: str = ""


METRICS: Mapping[str, Metric] = {
    "batchsd_rows_total": Metric("counter", "rows committed; the status `ok` are pictures", "status"),
    "batchsd_drawn_total": Metric("counter", "rows that workers finished, those that are lost and drawn again too"),
    "batchsd_shards_total": Metric("counter", "shards committed"),
    "batchsd_bytes_total": Metric("counter", "bytes of the files committed"),
    "batchsd_attempts_total": Metric("counter", "shards given to workers, again where one was lost"),
    "batchsd_lost_total": Metric("counter", "workers lost, by what ended them", "kind"),
    "batchsd_stage_seconds_total": Metric("counter", "seconds of all workers in each stage of the engine", "stage"),
    "batchsd_evaluations_total": Metric("counter", "network evaluations: lanes in use, summed over the calls"),
    "batchsd_lanes_total": Metric("counter", "lanes that those calls had: evaluations by lanes is the occupancy"),
    "batchsd_shard_seconds": Metric("histogram", "seconds from the first row of a shard to its handing in"),
    "batchsd_running": Metric("gauge", "1 while the driver is at work, 0 from its end"),
    "batchsd_rows_planned": Metric("gauge", "rows of the plan"),
    "batchsd_rows_done": Metric("gauge", "of these finished, earlier starts and shards still open included"),
    "batchsd_workers": Metric("gauge", "workers whose process is up"),
    "batchsd_workers_wanted": Metric("gauge", "workers that the run has places for"),
}

Record = Callable[..., None]
"""`record(name, value, label)`: one figure of this run."""


class Crewed(Executor, Protocol):
    """An executor that knows how many of its workers are up, and how many it has places for."""

    @property
    def manned(self) -> tuple[int, int]: ...


@cache
def instruments() -> Mapping[str, Any]:
    """Ray's own object for each metric; once a process, as it keeps them by name."""
    from ray.util import metrics

    kinds: Mapping[str, Callable[..., Any]] = {
        "counter": metrics.Counter,
        "gauge": metrics.Gauge,
        "histogram": partial(metrics.Histogram, boundaries=SECONDS),
    }
    return {
        name: kinds[metric.kind](name, description=metric.text, tag_keys=("run", *filter(None, [metric.label])))
        for name, metric in METRICS.items()
    }


def record_for(uri: str) -> Record:
    """The recorder of one run; its label `run` is the last part of the output's uri."""
    run = uri.rstrip("/").rpartition("/")[2]
    ways = {"counter": "inc", "gauge": "set", "histogram": "observe"}

    def record(name: str, value: float = 1, label: str = "") -> None:
        metric = METRICS[name]
        if value > 0 or metric.kind != "counter":  # Ray refuses to count nothing
            tags = {"run": run} | ({metric.label: label} if metric.label else {})
            getattr(instruments()[name], ways[metric.kind])(value, tags=tags)

    return record


class Measured:
    """An executor whose events are counted on their way to the dispatcher (see `executor.Executor`)."""

    def __init__(self, executor: Crewed, record: Record) -> None:
        self.workers, self.inside = executor.workers, executor.inside
        self._executor, self._record = executor, record

    def run(self, dispatcher: Dispatcher) -> None:
        watched = Watched(dispatcher, self._record, lambda: self._executor.manned)
        watched.state(1)
        try:
            self._executor.run(watched)
        finally:
            watched.state(0)


class Watched:
    """A dispatcher whose orders and events are counted (see `executor.Dispatcher`)."""

    def __init__(self, dispatcher: Dispatcher, record: Record, manned: Callable[[], tuple[int, int]]) -> None:
        self._dispatcher, self._record, self._manned = dispatcher, record, manned
        self._gauges_at = 0.0

    def state(self, running: int) -> None:
        """The gauges as they are now."""
        self._gauges_at = time.monotonic()
        now, (up, wanted) = self.snapshot(), self._manned()
        self._record("batchsd_running", running)
        self._record("batchsd_rows_planned", now.planned)
        self._record("batchsd_rows_done", now.done)
        self._record("batchsd_workers", up)
        self._record("batchsd_workers_wanted", wanted)

    def take(self, worker: int) -> Order | None:
        order = self._dispatcher.take(worker)
        if isinstance(order, Ticket):
            self._record("batchsd_attempts_total")
        return order

    def handle(self, worker: int, event: Event) -> None:
        self._dispatcher.handle(worker, event)
        if isinstance(event, Progress):
            self._record("batchsd_drawn_total", event.ok + event.failed)
        elif isinstance(event, ShardResult):
            count_shard(event, self._record)

    def lost(self, worker: int, loss: Loss) -> float:
        self._record("batchsd_lost_total", 1, loss.kind)
        return self._dispatcher.lost(worker, loss)

    def fail(self, reason: str) -> None:
        self._dispatcher.fail(reason)

    def tick(self) -> None:
        if time.monotonic() - self._gauges_at >= GAUGES_EVERY:
            self.state(1)
        self._dispatcher.tick()

    def snapshot(self) -> Snapshot:
        return self._dispatcher.snapshot()

    @property
    def over(self) -> bool:
        return self._dispatcher.over


def count_shard(result: ShardResult, record: Record) -> None:
    """What a committed shard adds: rows by status, bytes, and its marker's timings."""
    for status, rows in {"ok": result.ok, **result.failed}.items():
        record("batchsd_rows_total", rows, status)
    record("batchsd_shards_total")
    record("batchsd_bytes_total", sum(file.bytes for file in result.files))
    record("batchsd_shard_seconds", result.timings.get("seconds", 0.0))
    for name, value in result.timings.items():
        if name.endswith("_seconds"):
            record("batchsd_stage_seconds_total", value, name.removesuffix("_seconds"))
    evaluations = result.timings.get("evaluations", 0)
    record("batchsd_evaluations_total", evaluations)
    record("batchsd_lanes_total", evaluations / (result.timings.get("occupancy") or 1))
