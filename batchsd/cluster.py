"""The worker's loop on Ray actors. The only file that imports ray.

    driver -- feed(ticket) --> actor          one or two tickets are with each actor
    driver <-- work(): events ---- actor      one streaming generator for the actor's whole life

Ray restarts and retries nothing: a dead actor's tickets go back to the dispatcher, which counts attempts, and
a new actor takes its place after a back-off.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from batchsd.actor import Failed, Message, Ready, Worker
from batchsd.run import Dispatcher, Workbench, describe
from batchsd.types import InfrastructureError, ShardResult

IN_FLIGHT = 2  # tickets with an actor: the next one is there before the last one ends
NODE_PATIENCE = 120.0  # seconds for a node to import what a question needs and answer it
POLL = 0.5  # seconds
LONGEST_BACK_OFF = 30.0  # seconds
SAY_EVERY = 30.0  # seconds between lines about workers that have not come
OBJECT_STORE = 128 * 2**20  # bytes; only tickets and events pass through it, never pictures


T = TypeVar("T")


def call_it(call: Callable[[], T]) -> T:
    """As a function of its own, for Ray: a partial has no name, which it asks for."""
    return call()


class Cluster:
    """A connection to Ray, begun at once in a thread: it takes seconds, in which the plan is made."""

    def __init__(self, address: str, cpus: int | None = None) -> None:
        self.address = address
        self._cpus = cpus  # of a private Ray
        self._up = threading.Event()
        self._close = threading.Event()
        self._error: BaseException | None = None
        # Ray's processes die with the thread that started them (PR_SET_PDEATHSIG): it must outlive the run.
        self._thread = threading.Thread(target=self._hold, name="ray", daemon=True)
        self._thread.start()

    def resources(self) -> dict[str, float]:
        """What the cluster has; waits until it is up. Raises InfrastructureError where it does not come."""
        self._up.wait()
        if self._error is not None:
            raise InfrastructureError(f"Ray at {self.address!r} does not start: {describe(self._error)}")
        import ray

        return ray.cluster_resources()

    def on_every_node(self, call: Callable[[], T]) -> dict[str, T]:
        """What `call` gives on each node, by the node's address. Raises InfrastructureError where one is silent."""
        self.resources()
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task: Any = ray.remote(num_cpus=0, max_retries=0)(call_it)
        asked = {}
        for node in ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked[node["NodeManagerAddress"], node["NodeID"]] = task.options(scheduling_strategy=there).remote(call)
        answers = {}
        for (address, number), reference in asked.items():
            try:
                # Several nodes of one address are a test's, on one machine.
                name = address if address not in answers else f"{address} ({number[:6]})"
                answers[name] = ray.get(reference, timeout=NODE_PATIENCE)
            except ray.exceptions.RayError as error:
                raise InfrastructureError(f"node {address} does not answer: {describe(error)}") from None
        return answers

    def close(self) -> None:
        """Leave the cluster, ending a private one. One that is not up yet ends with this process."""
        if not self._up.is_set():
            return
        if self._error is None:
            import ray

            ray.shutdown()
        self._close.set()
        self._thread.join(timeout=5)

    def _hold(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its future default; else it warns
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault(
            "RAY_worker_niceness", "0"
        )  # of a private Ray; its 15 starves us on a busy machine
        private: dict[str, Any] = {}
        if self.address == "local":
            private = {
                "num_cpus": self._cpus,
                "object_store_memory": OBJECT_STORE,
                "include_dashboard": False,
            }
        try:
            import ray

            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, **private)
        except BaseException as error:  # told to whoever asks
            self._error = error
        self._up.set()
        self._close.wait()


@dataclass
class Seat:
    """The place of one worker, and who sits there now."""

    number: int
    actor: Any = None
    stream: Any = None
    ready: bool = False
    tickets: int = 0
    deaths: int = 0  # in a row, without a shard handed in between
    again_at: float = 0.0


class RayActors:
    """Workers as Ray actors (see `run.Executor`). `reserve` is kept for each: num_cpus and num_gpus."""

    def __init__(
        self,
        build: Callable[[], Workbench],
        workers: int,
        reserve: Mapping[str, float],
        threads: int,
        log: Callable[[str], None],
    ) -> None:
        import ray

        self.workers = workers
        self._reserve = dict(reserve)
        self._threads = threads
        self._build = build
        self._log = log
        self._seats = [Seat(number) for number in range(workers)]
        self._said = time.monotonic()
        self._kind: Any = ray.remote(concurrency_groups={"feed": 1})(Worker)  # type: ignore[call-overload]

    def run(self, dispatcher: Dispatcher) -> None:
        try:
            while not dispatcher.over:
                for seat in self._seats:
                    self._fill(seat)
                    self._feed(seat, dispatcher)
                for seat in self._ready_seats():
                    self._receive(seat, dispatcher)
                self._say_who_is_missing()
                dispatcher.tick()
        finally:
            for seat in self._seats:
                self._dismiss(seat)

    def _fill(self, seat: Seat) -> None:
        if seat.actor is not None or time.monotonic() < seat.again_at:
            return
        kind = self._kind.options(max_restarts=0, max_task_retries=0, **self._reserve)
        seat.actor = kind.remote(self._build, self._threads)
        seat.stream = seat.actor.work.options(num_returns="streaming").remote()

    def _feed(self, seat: Seat, dispatcher: Dispatcher) -> None:
        while seat.ready and seat.tickets < IN_FLIGHT and (ticket := dispatcher.take(seat.number)):
            seat.tickets += 1
            seat.actor.feed.options(concurrency_group="feed").remote(ticket)

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
            self._lost(seat, dispatcher, "the worker ended by itself", "")
        except ray.exceptions.RayError as error:
            self._lost(seat, dispatcher, cause_of(error), str(error))
        else:
            if isinstance(message, Failed):
                if message.kind is not None:
                    raise message.kind(message.message)
                self._lost(seat, dispatcher, message.message, message.log)
            elif isinstance(message, Ready):
                seat.ready = True
            else:
                if isinstance(message, ShardResult):
                    seat.tickets -= 1
                    seat.deaths = 0
                dispatcher.handle(seat.number, message)

    def _lost(self, seat: Seat, dispatcher: Dispatcher, cause: str, log: str) -> None:
        self._dismiss(seat)
        seat.ready, seat.tickets = False, 0
        seat.again_at = time.monotonic() + min(LONGEST_BACK_OFF, 2.0**seat.deaths - 1)
        seat.deaths += 1
        dispatcher.lost(seat.number, cause, log)

    def _dismiss(self, seat: Seat) -> None:
        import ray

        if seat.actor is not None:
            with contextlib.suppress(Exception):  # it is dead already, or Ray is
                ray.kill(seat.actor)
        seat.actor = seat.stream = None

    def _say_who_is_missing(self) -> None:
        missing = sum(not seat.ready for seat in self._seats)
        if missing and time.monotonic() - self._said > SAY_EVERY:
            self._said = time.monotonic()
            self._log(f"{self.workers - missing} of {self.workers} workers are up, waiting for the others")


def cause_of(error: BaseException) -> str:
    """Ray's account of a death, in one line."""
    text = str(error)
    for mark, cause in (
        ("out of memory", "the worker's process ran out of memory and was killed"),
        ("node was terminated", "the worker's node is gone"),
        ("node has died", "the worker's node is gone"),
        ("worker process has died", "the worker's process was killed or crashed"),
    ):
        if mark in text.lower():
            return cause
    return describe(error)[:300]
