"""The worker's loop on Ray actors: each worker has a seat, where a new actor sits down when the last one is dead.

    driver -- feed(ticket) --> actor          one or two tickets are with each actor
    driver <-- work(): events ---- actor      one streaming generator for the actor's whole life

Ray restarts and retries nothing: a dead actor's tickets go back to the dispatcher, which counts attempts, and
a new actor takes its place after a back-off.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from batchsd.actor import Failed, Message, Pulse, Ready, Started, Worker
from batchsd.bench import Workbench
from batchsd.deadlines import Deadline, Patience
from batchsd.executor import Dispatcher, Kind, Loss, describe
from batchsd.types import InfrastructureError, Progress, ShardResult, Tried, UsageError

IN_FLIGHT = 2  # tickets with an actor: the next one is there before the last one ends
POLL = 0.5  # seconds
LONGEST_BACK_OFF = 30.0  # seconds
SAY_EVERY = 30.0  # seconds between lines about workers that have not come


@dataclass
class Seat:
    """The place of one worker, and who sits there now. `up`: its process runs; `ready`: its workbench is built."""

    number: int
    deadline: Deadline
    actor: Any = None
    stream: Any = None
    up: bool = False
    ready: bool = False
    orders: int = 0
    deaths: int = 0  # in a row, without a shard handed in between
    again_at: float = 0.0


@dataclass(frozen=True)
class Reserve:
    """What Ray keeps for each worker, and how long to wait for it.

    `wait`: seconds without any worker, after which the run gives up. `room`: how many workers the cluster has room
    for by now, where nodes that join later are to be used; else None.
    """

    cpus: float = 1
    gpus: float = 0
    threads: int = 1
    wait: float = 600
    room: Callable[[], int] | None = None


class RayActors:
    """Workers as Ray actors (see `executor.Executor`)."""

    inside = False

    def __init__(
        self,
        build: Callable[[], Workbench],
        workers: int,
        reserve: Reserve,
        log: Callable[[str], None],
        patience: Patience = Patience(),  # noqa: B008 (frozen)
    ) -> None:
        import ray

        self.workers = workers
        self._reserve = reserve
        self._build = build
        self._log = log
        self._patience = patience
        self._seats: list[Seat] = []
        self._add_seats(workers)
        self._said = self._any_up_at = time.monotonic()
        self._kind: Any = ray.remote(concurrency_groups={"feed": 1})(Worker)  # type: ignore[call-overload]

    def run(self, dispatcher: Dispatcher) -> None:
        try:
            while not dispatcher.over:
                for seat in self._seats:
                    self._fill(seat)
                    self._feed(seat, dispatcher)
                for seat in self._ready_seats():
                    self._receive(seat, dispatcher)
                for seat in self._seats:
                    if seat.actor is not None and seat.deadline.overdue:
                        self._lost(seat, dispatcher, Loss("timeout", seat.deadline.message))
                self._look_for_room()
                dispatcher.tick()
        finally:
            for seat in self._seats:
                self._dismiss(seat)

    @property
    def manned(self) -> tuple[int, int]:
        """How many seats have a process that is up, and how many there are."""
        return sum(seat.up for seat in self._seats), len(self._seats)

    def _add_seats(self, count: int) -> None:
        first = len(self._seats)
        self._seats += [Seat(number, Deadline(self._patience)) for number in range(first, first + count)]

    def _fill(self, seat: Seat) -> None:
        if seat.actor is not None or time.monotonic() < seat.again_at:
            return
        reserve = {"num_cpus": self._reserve.cpus, "num_gpus": self._reserve.gpus}
        kind = self._kind.options(max_restarts=0, max_task_retries=0, **reserve)
        seat.deadline = Deadline(Patience())  # while it loads its model: `run.timeout` is for batches
        seat.actor = kind.remote(self._build, self._reserve.threads)
        seat.stream = seat.actor.work.options(num_returns="streaming").remote()

    def _feed(self, seat: Seat, dispatcher: Dispatcher) -> None:
        while seat.ready and seat.orders < IN_FLIGHT and (order := dispatcher.take(seat.number)):
            if not seat.orders:
                seat.deadline.sign(long=True)  # until it says more: it opens files, and draws its first row
            seat.orders += 1
            seat.actor.feed.options(concurrency_group="feed").remote(order)

    def _ready_seats(self) -> list[Seat]:
        """Seats with a message, waiting a little for the first."""
        import ray

        seats = {seat.stream: seat for seat in self._seats if seat.actor is not None}
        if not seats:
            time.sleep(POLL)
            return []
        first, _ = ray.wait(list(seats), timeout=POLL)
        if not first:
            return []
        ready, _ = ray.wait(list(seats), num_returns=len(seats), timeout=0)
        return [seats[stream] for stream in ready]

    def _receive(self, seat: Seat, dispatcher: Dispatcher) -> None:
        import ray

        try:
            message: Message = ray.get(next(seat.stream))
        except StopIteration:
            self._lost(seat, dispatcher, Loss("crashed", "the worker ended by itself"))
        except ray.exceptions.RayError as error:
            if "owner has died" in str(error):  # ours: that is us, as the cluster sees it
                raise InfrastructureError(
                    "Ray counts this driver among the dead, for its node was lost, and has ended its workers; run the "
                    "same command again, on a node that lives"
                ) from error
            self._lost(seat, dispatcher, loss_of(error))
        else:
            self._take_in(seat, dispatcher, message)

    def _take_in(self, seat: Seat, dispatcher: Dispatcher, message: Message) -> None:
        if isinstance(message, Failed):
            if message.kind is UsageError:
                raise UsageError(message.message)
            kind: Kind = "storage" if message.kind is InfrastructureError else "raised"
            self._lost(seat, dispatcher, Loss(kind, message.message, message.log))
        elif isinstance(message, Started):
            seat.up = True
            seat.deadline.sign(long=True)
        elif isinstance(message, Ready):
            seat.ready = True
            seat.deadline = Deadline(self._patience)
        elif isinstance(message, Pulse):
            seat.deadline.sign()
        else:
            if isinstance(message, ShardResult | Tried):
                seat.orders -= 1
                seat.deaths = 0
            if isinstance(message, Progress):
                seat.deadline.sign(message.long)
            elif seat.orders:
                seat.deadline.sign(long=True)
            else:
                seat.deadline.rest()
            dispatcher.handle(seat.number, message)

    def _lost(self, seat: Seat, dispatcher: Dispatcher, loss: Loss) -> None:
        self._dismiss(seat)
        wait = dispatcher.lost(seat.number, loss)
        seat.again_at = time.monotonic() + max(wait, min(LONGEST_BACK_OFF, 2.0**seat.deaths - 1))
        seat.deaths += 1

    def _dismiss(self, seat: Seat) -> None:
        import ray

        if seat.actor is not None:
            with contextlib.suppress(Exception):  # it is dead already, or Ray is
                ray.kill(seat.actor)
        seat.actor = seat.stream = None
        seat.up = seat.ready = False
        seat.orders = 0
        seat.deadline.rest()

    def _look_for_room(self) -> None:
        """Now and then: who is missing, and whether there is room for more. Raises where nobody comes at all."""
        now, (up, _) = time.monotonic(), self.manned
        if up:
            self._any_up_at = now
        elif now - self._any_up_at > self._reserve.wait:
            raise InfrastructureError(
                f"no worker in {self._reserve.wait:g} s (ray.wait): each wants {self._wants()}; the cluster has "
                f"{self._has()}; run the same command again when there are nodes"
            )
        if now - self._said < SAY_EVERY:
            return
        self._said = now
        if self._reserve.room is not None:
            self._add_seats(max(0, self._reserve.room() - len(self._seats)))
        if up < len(self._seats):
            self._log(
                f"{up} of {len(self._seats)} workers are up, waiting for the others: each wants {self._wants()}, "
                f"the cluster has {self._has()}"
            )

    def _wants(self) -> str:
        gpus, cpus = self._reserve.gpus, self._reserve.cpus
        return f"{gpus:g} GPU" if gpus else f"{cpus:g} CPU"

    @staticmethod
    def _has() -> str:
        import ray

        found = ray.cluster_resources()
        return f"{found.get('GPU', 0):g} GPU and {found.get('CPU', 0):g} CPU"


def loss_of(error: BaseException) -> Loss:
    """Ray's account of a death: whether a row may have done it, in one line and whole."""
    text = str(error)
    accounts: tuple[tuple[str, Kind, str], ...] = (
        ("out of memory", "oom", "the worker's process ran out of memory and was killed"),
        ("preempted", "node", "the worker's node was taken away"),
        ("node was terminated", "node", "the worker's node is gone"),
        ("node has died", "node", "the worker's node is gone"),
        ("node is dead", "node", "the worker's node is gone"),
        ("temporarily unavailable", "node", "the worker's node does not answer"),
        ("worker process has died", "crashed", "the worker's process was killed or crashed"),
    )
    for mark, kind, cause in accounts:
        if mark in text.lower():
            return Loss(kind, cause, text)
    return Loss("crashed", describe(error)[:300], text)
