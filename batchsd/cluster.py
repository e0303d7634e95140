"""The connection to Ray: a private one on this machine, or a cluster; and questions to all of its nodes."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from batchsd.access import has_token
from batchsd.executor import Dispatcher, Executor, describe
from batchsd.types import InfrastructureError

KNOCK_PATIENCE = 10.0  # seconds
LOOK_EVERY = 5.0  # seconds between looks at the head
HEAD_PATIENCE = 40.0  # seconds of silence; after 60 Ray ends its drivers, with code 1 and no word for a user
NODE_PATIENCE = 120.0  # seconds for a node to import what a question needs and answer it
OBJECT_STORE = 128 * 2**20  # bytes; only tickets and events pass through it, never pictures
# Ray's own, where the user has not set them.
OPTIONS = {
    "ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its future default; else it warns
    "USAGE_STATS_ENABLED": "0",
    "worker_niceness": "0",  # of a private Ray; its 15 starves us on a busy machine
    # A node's death is known after some missed health checks. Until then its actors are "unavailable", which after
    # Ray's 1 s would look like a crash, and rows would be suspected of it.
    "timeout_ms_task_wait_for_death_info": "90000",
}

T = TypeVar("T")


def call_it(call: Callable[[], T]) -> T:
    """As a function of its own, for Ray: a partial has no name, which it asks for."""
    return call()


def knock(address: str, patience: float = KNOCK_PATIENCE) -> None:
    """Raises OSError where nothing listens: Ray itself would try for a quarter of an hour, in silence."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=patience).close()


class Cluster:
    """A connection to Ray, begun at once in a thread: it takes seconds, in which the plan is made.

    `lost` is called from that thread, with the reason, where the cluster's head is dead: no call to Ray returns then.
    """

    def __init__(
        self, address: str, cpus: int | None = None, lost: Callable[[str], None] = lambda reason: None
    ) -> None:
        self.address = address
        self.lost = lost
        self._cpus = cpus  # of a private Ray
        self._up = threading.Event()
        self._close = threading.Event()
        self._error: BaseException | None = None
        # Ray's processes die with the thread that started them (PR_SET_PDEATHSIG): it must outlive the run.
        self._thread = threading.Thread(target=self._hold, name="ray", daemon=True)
        self._thread.start()

    def nodes(self) -> list[dict[str, float]]:
        """What each living node has; waits until Ray is up. Raises InfrastructureError where it does not come."""
        return [node["Resources"] for node in self._alive()]

    def _alive(self) -> list[dict[str, Any]]:
        self._up.wait()
        if self._error is not None:
            # Where somebody listens and Ray says no more than that it failed.
            tokenless = type(self._error) is ConnectionError and self.address != "local" and not has_token(os.environ)
            hint = "; if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here too" if tokenless else ""
            raise InfrastructureError(f"Ray at {self.address!r} does not answer: {describe(self._error)}{hint}")
        import ray

        return [node for node in ray.nodes() if node["Alive"]]

    def on_every_node(self, call: Callable[[], T]) -> dict[str, T]:
        """What `call` gives on each node, by the node's address. Raises InfrastructureError where one is silent."""
        nodes = self._alive()
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task: Any = ray.remote(num_cpus=0, max_retries=0)(call_it)
        asked = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[node["NodeManagerAddress"], node["NodeID"]] = task.options(scheduling_strategy=there).remote(call)
        answers = {}
        for (address, number), reference in asked.items():
            try:
                # Several nodes of one address are a test's, on one machine.
                name = address if address not in answers else f"{address} ({number[:6]})"
                answers[name] = ray.get(reference, timeout=NODE_PATIENCE)
            except ray.exceptions.RayError as error:
                if number not in {node["NodeID"] for node in self._alive()}:
                    continue  # it has left meanwhile
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
        for name, value in OPTIONS.items():
            os.environ.setdefault(f"RAY_{name}", value)
        private: dict[str, Any] = {}
        if self.address == "local":
            private = {
                "num_cpus": self._cpus,
                "object_store_memory": OBJECT_STORE,
                "include_dashboard": False,
            }
        try:
            if self.address != "local":
                knock(self.address)
            import ray

            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, **private)
            head = ray.get_runtime_context().gcs_address
        except BaseException as error:  # told to whoever asks
            self._error = error
        self._up.set()
        if self._error is None:
            self._guard(head)
        self._close.wait()

    def _guard(self, head: str) -> None:
        """Until the end: does the head still answer?"""
        heard, missed = time.monotonic(), 0
        while not self._close.wait(LOOK_EVERY):
            try:
                knock(head, LOOK_EVERY)
                heard, missed = time.monotonic(), 0
            except OSError as error:
                silent, missed = time.monotonic() - heard, missed + 1
                if silent > HEAD_PATIENCE and missed > 2:  # one after a long pause may be this process's own
                    self.lost(
                        f"Ray's head at {head} has not answered for {silent:.0f} s ({describe(error)}); run the same "
                        "command again when there is a cluster"
                    )
                    return


class Headed:
    """An executor on a cluster: before a head that is dead ends this process, the run's status says so."""

    def __init__(self, executor: Executor, cluster: Cluster) -> None:
        self.workers, self.inside = executor.workers, executor.inside
        self._executor, self._cluster = executor, cluster

    def run(self, dispatcher: Dispatcher) -> None:
        lost = self._cluster.lost

        def told(reason: str) -> None:
            dispatcher.fail(reason)
            lost(reason)

        self._cluster.lost = told
        try:
            self._executor.run(dispatcher)
        finally:
            self._cluster.lost = lost
