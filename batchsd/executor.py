"""Where workers live, as the driver sees it; and the one place that needs no Ray: this process.

    executor -- take --> driver -- ticket --> worker -- events --> executor -- handle --> driver

A worker that raises is built anew. One that ends this process, or hangs it, is found out by the next start.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol

from batchsd.bench import Drained, Order, Workbench
from batchsd.deadlines import Deadline, Patience
from batchsd.progress import Snapshot
from batchsd.run import work
from batchsd.types import BatchsdError, Event, InfrastructureError, Progress, ShardResult

Kind = Literal["crashed", "timeout", "oom", "raised", "node", "storage"]
WATCH_EVERY = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Loss:
    """How a worker came to its end. `cause` is one line for people, `log` all that is known.

    `crashed`, `timeout`, `oom` and `raised` may be a row's doing; `node` (it died, or was taken away) and `storage`
    never are.
    """

    kind: Kind
    cause: str
    log: str = ""


class Dispatcher(Protocol):
    """The driver, as executors see it: gives orders out, takes events in. `worker` counts from 0."""

    def take(self, worker: int) -> Order | None:
        """The next order for this worker; None where there is none just now."""
        ...

    def handle(self, worker: int, event: Event) -> None:
        """An event of that worker; a ShardResult is committed before this returns."""
        ...

    def lost(self, worker: int, loss: Loss) -> float:
        """That worker is no more: its orders go to others. Gives the seconds to wait before the next one starts.

        Raises where it has happened too often.
        """
        ...

    def fail(self, reason: str) -> None:
        """This process is about to end, for that reason."""
        ...

    def tick(self) -> None:
        """To be called often: reports, and raises where the run must stop at once."""
        ...

    def snapshot(self) -> Snapshot:
        """How far the run is."""
        ...

    @property
    def over(self) -> bool:
        """Nothing is left to give out, and nothing is out."""
        ...


class Executor(Protocol):
    """Where workers live. `run` returns when the dispatcher is over; whatever it raised passes through.

    `inside`: in the driver's own process, which a worker takes along when it dies.
    """

    workers: int
    inside: bool

    def run(self, dispatcher: Dispatcher) -> None: ...


class InProcess:
    """One worker, here: no start-up, the same protocol. `build` makes the workbench.

    `end` ends this process, whatever hangs in it, with a message.
    """

    workers = 1
    inside = True

    def __init__(
        self,
        build: Callable[[], Workbench],
        patience: Patience = Patience(),  # noqa: B008 (frozen)
        end: Callable[[str], None] | None = None,
    ) -> None:
        self.build = build
        self._patience = patience
        self._end = end
        self._wait = 0.0  # seconds, before the next worker starts

    def run(self, dispatcher: Dispatcher) -> None:
        while not dispatcher.over:
            time.sleep(self._wait)
            self._wait = 0.0
            watch = Watch(self._patience, dispatcher, self._end)
            with watch, closing(self._events(dispatcher, watch)) as events:
                while (event := self._next(events, dispatcher)) is not None:
                    watch.saw(event)
                    dispatcher.handle(0, event)
                    dispatcher.tick()

    def _next(self, events: Generator[Event], dispatcher: Dispatcher) -> Event | None:
        """The next event; None where there is none, or the worker is lost."""
        try:
            return next(events, None)
        except InfrastructureError as error:
            loss = Loss("storage", str(error), traceback.format_exc())
        except BatchsdError:
            raise
        except Exception as error:  # as if this worker had died: whatever it held is tried again
            loss = Loss("raised", describe(error), traceback.format_exc())
        self._wait = dispatcher.lost(0, loss)
        return None

    def _events(self, dispatcher: Dispatcher, watch: Watch) -> Generator[Event]:
        def take(wait: bool) -> Order:
            order = dispatcher.take(0)
            if order is None:
                raise Drained
            return order

        def announce(event: Event) -> None:
            watch.saw(event)
            dispatcher.handle(0, event)

        bench = self.build()
        watch.begin(bench.beat)
        yield from work(bench, take, announce)


class Watch:
    """Looks from a thread whether the worker in this process still moves; if not, says so and ends the process."""

    def __init__(self, patience: Patience, dispatcher: Dispatcher, end: Callable[[str], None] | None) -> None:
        self._deadline = Deadline(patience)
        self._dispatcher = dispatcher
        self._end = end
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._beat: Callable[[], int] = int
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        return self

    def begin(self, beat: Callable[[], int]) -> None:
        """The worker is built. `beat` gives a number that grows while it works."""
        self._beat = beat
        if self._end is not None:
            self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def saw(self, event: Event) -> None:
        committing = isinstance(event, ShardResult)
        self._deadline.sign(committing or (isinstance(event, Progress) and event.long))

    def _look(self) -> None:
        before = self._beat()
        while not self._over.wait(WATCH_EVERY):
            if (now := self._beat()) != before:
                before = now
                self._deadline.sign()
            if self._deadline.overdue and self._end is not None:
                stack = sys._current_frames().get(self._main)
                log = "".join(traceback.format_stack(stack)) if stack else ""
                reason = f"{self._deadline.message}; run the same command again: it finds the row by itself"
                try:
                    self._dispatcher.lost(0, Loss("timeout", self._deadline.message, log))
                except BatchsdError as error:
                    reason = str(error)
                self._dispatcher.fail(reason)
                self._end(reason)


def describe(error: BaseException) -> str:
    """An unexpected error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
