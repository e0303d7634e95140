"""What a Ray actor does all its life: the worker's loop in a thread, with tickets in and messages out.

Plain Python: `batchsd.seats` makes an actor of `Worker`.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from batchsd.bench import Drained, Order, Workbench
from batchsd.executor import describe
from batchsd.run import work
from batchsd.types import BatchsdError, Event, InfrastructureError, Progress, UsageError

PULSE_EVERY = 2.0  # seconds


@dataclass(frozen=True, slots=True)
class Started:
    """The process is there, and begins to build its workbench."""

    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The workbench is built; orders are welcome."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """The engine has moved since the last one."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker raised. In plain words: an exception may not pickle, its class may not exist elsewhere."""

    kind: type[BatchsdError] | None
    message: str
    log: str


Message = Event | Started | Ready | Pulse | Failed


class Outbox:
    """Messages on their way out. Progress that waits is merged, so that a slow line never grows."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._changed = threading.Condition()
        self.ended = False

    def put(self, message: Message) -> None:
        with self._changed:
            last = self._messages[-1] if self._messages else None
            if isinstance(message, Pulse) and last is not None:
                return  # something that waits says as much
            if isinstance(message, Progress) and isinstance(last, Progress) and last.shard == message.shard:
                ok, failed = last.ok + message.ok, last.failed + message.failed
                good = last.good if message.good < 0 else message.good
                self._messages[-1] = replace(message, ok=ok, failed=failed, good=good)
            else:
                self._messages.append(message)
            self._changed.notify()

    def end(self) -> None:
        with self._changed:
            self.ended = True
            self._changed.notify()

    def __iter__(self) -> Iterator[Message]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._messages or self.ended)
                if not self._messages:
                    return
                message = self._messages.popleft()
            yield message


class Worker:
    """The actor. `work` streams its messages while `feed`, in a thread of its own, takes tickets in."""

    def __init__(self, build: Callable[[], Workbench], threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it when it is imported
        self._build = build
        self._orders: queue.Queue[Order | None] = queue.Queue()
        self._outbox = Outbox()

    def feed(self, order: Order | None) -> None:
        """One more order; None: no more will come."""
        self._orders.put(order)

    def work(self) -> Iterator[Message]:
        # The loop has a thread of its own: what it announces leaves even while the network runs.
        threading.Thread(target=self._loop, name="work", daemon=True).start()
        yield from self._outbox

    def _loop(self) -> None:
        self._outbox.put(Started(socket.gethostname(), os.getpid()))
        try:
            bench = self._build()
            self._outbox.put(Ready())
            threading.Thread(target=self._pulse, args=(bench.beat,), name="pulse", daemon=True).start()
            for event in work(bench, self._take, self._outbox.put):
                self._outbox.put(event)
        except BaseException as error:
            known = next((k for k in (UsageError, InfrastructureError) if isinstance(error, k)), None)
            message = str(error) if known else describe(error)
            self._outbox.put(Failed(known, message, traceback.format_exc()))
        finally:
            self._outbox.end()

    def _pulse(self, beat: Callable[[], int]) -> None:
        before = beat()
        while not self._outbox.ended:
            time.sleep(PULSE_EVERY)
            if (now := beat()) != before:
                before = now
                self._outbox.put(Pulse())

    def _take(self, wait: bool) -> Order | None:
        try:
            order = self._orders.get(block=wait)
        except queue.Empty:
            return None
        if order is None:
            self._orders.put(None)  # asked again, the answer is the same
            raise Drained
        return order
