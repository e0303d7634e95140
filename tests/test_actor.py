from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
from fakes import shards_of, workbench

from batchsd.actor import Failed, Outbox, Pulse, Ready, Started, Worker
from batchsd.bench import Ticket, Workbench
from batchsd.store import LocalStore
from batchsd.types import BatchsdError, InfrastructureError, Progress, ShardResult, UsageError

SHARDS = shards_of(3, 4)


def test_waiting_progress_is_merged_and_nothing_is_lost() -> None:
    outbox = Outbox()
    one, two = SHARDS[:2]
    for shard in (one, one, two, one):
        outbox.put(Progress(shard, 1, 0, ("a",)))
    outbox.put(Progress(one, 0, 1, ("b",)))
    result = ShardResult(one, "n", 6, 6, {}, (), {}, {})
    outbox.put(result)
    outbox.end()
    assert list(outbox) == [
        Progress(one, 2, 0, ("a",)),
        Progress(two, 1, 0, ("a",)),
        Progress(one, 1, 1, ("b",)),
        result,
    ]


def test_a_pulse_is_sent_where_nothing_else_is_to_be_said() -> None:
    outbox = Outbox()
    outbox.put(Pulse())
    outbox.put(Pulse())
    outbox.put(Progress(SHARDS[0], 1, 0, good=3))
    outbox.put(Progress(SHARDS[0], 0, 1))
    outbox.put(Pulse())
    outbox.end()
    assert list(outbox) == [Pulse(), Progress(SHARDS[0], 1, 1, good=3)]


def test_a_worker_says_ready_then_draws_its_tickets(tmp_path: Path) -> None:
    worker = Worker(partial(workbench, LocalStore(tmp_path)), threads=1)
    for shard in SHARDS:
        worker.feed(Ticket(shard, f"nonce{shard.index}"))
    worker.feed(None)
    started, ready, *events = worker.work()
    assert isinstance(started, Started) and started.pid == os.getpid()
    assert ready == Ready()
    done = [event for event in events if isinstance(event, ShardResult)]
    assert {result.shard for result in done} == set(SHARDS)
    assert sum(event.ok for event in events if isinstance(event, Progress)) == 12


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UsageError("3 tensors unused"), UsageError, "3 tensors unused"),
        (InfrastructureError("disk full"), InfrastructureError, "disk full"),
        (RuntimeError("the device is\ngone"), None, "RuntimeError: the device is gone"),
        (SystemExit(3), None, "SystemExit: 3"),
    ],
)
def test_an_error_travels_as_words(
    error: BaseException, kind: type[BatchsdError] | None, message: str
) -> None:
    def build() -> Workbench:
        raise error

    _, said = list(Worker(build, threads=1).work())
    assert isinstance(said, Failed)
    assert (said.kind, said.message) == (kind, message)
    assert "Traceback" in said.log
