"""What a Ray actor does all its life: the worker's loop in a thread, with tickets in and messages out.

Plain Python: `batchsd.cluster` makes an actor of `Worker`.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from batchsd.run import Drained, Ticket, Workbench, describe, work
from batchsd.types import BatchsdError, Event, InfrastructureError, Progress, UsageError


@dataclass(frozen=True, slots=True)
class Ready:
    """The workbench is built; tickets are welcome."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker raised. In plain words: an exception may not pickle, its class may not exist elsewhere."""

    kind: type[BatchsdError] | None
    message: str
    log: str


Message = Event | Ready | Failed


class Outbox:
    """Messages on their way out. Progress that waits is merged, so that a slow line never grows."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._changed = threading.Condition()
        self._ended = False

    def put(self, message: Message) -> None:
        with self._changed:
            last = self._messages[-1] if self._messages else None
            if isinstance(message, Progress) and isinstance(last, Progress) and last.shard == message.shard:
                ok, failed = last.ok + message.ok, last.failed + message.failed
                self._messages[-1] = replace(message, ok=ok, failed=failed)
            else:
                self._messages.append(message)
            self._changed.notify()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()

    def __iter__(self) -> Iterator[Message]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._messages or self._ended)
                if not self._messages:
                    return
                message = self._messages.popleft()
            yield message


class Worker:
    """The actor. `work` streams its messages while `feed`, in a thread of its own, takes tickets in."""

    def __init__(self, build: Callable[[], Workbench], threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it when it is imported
        self._build = build
        self._tickets: queue.Queue[Ticket | None] = queue.Queue()
        self._outbox = Outbox()

    def feed(self, ticket: Ticket | None) -> None:
        """One more ticket; None: no more will come."""
        self._tickets.put(ticket)

    def work(self) -> Iterator[Message]:
        # The loop has a thread of its own: what it announces leaves even while the network runs.
        threading.Thread(target=self._loop, name="work", daemon=True).start()
        yield from self._outbox

    def _loop(self) -> None:
        try:
            bench = self._build()
            self._outbox.put(Ready())
            for event in work(bench, self._take, self._outbox.put):
                self._outbox.put(event)
        except BaseException as error:
            known = next((k for k in (UsageError, InfrastructureError) if isinstance(error, k)), None)
            message = str(error) if known else describe(error)
            self._outbox.put(Failed(known, message, traceback.format_exc()))
        finally:
            self._outbox.end()

    def _take(self, wait: bool) -> Ticket | None:
        try:
            ticket = self._tickets.get(block=wait)
        except queue.Empty:
            return None
        if ticket is None:
            self._tickets.put(None)  # asked again, the answer is the same
            raise Drained
        return ticket
