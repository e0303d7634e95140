"""The connection to Ray, where it does not come; on real nodes see test_nodes.py."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from batchsd import cluster
from batchsd.cluster import Cluster, Headed
from batchsd.types import InfrastructureError


def test_where_nothing_listens_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(InfrastructureError, match=f"'{address}' does not answer: ConnectionRefusedError: "):
        Cluster(address).nodes()


def test_a_cluster_that_does_not_take_us_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(**_: Any) -> None:
        raise ConnectionError("another version of Ray")

    import ray

    monkeypatch.setattr(ray, "init", connect)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        said = f"'{address}' does not answer: ConnectionError: another version.* RAY_AUTH_TOKEN"
        with pytest.raises(InfrastructureError, match=said):
            Cluster(address).nodes()


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where Ray's head would listen, looked at every 20 ms and missed after a second."""
    import ray

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(ray, "init", lambda **_: None)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        monkeypatch.setattr(ray, "nodes", list)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        monkeypatch.setattr(cluster, "LOOK_EVERY", 0.02)
        monkeypatch.setattr(cluster, "HEAD_PATIENCE", 1.0)
        yield server


def test_a_head_that_dies_ends_the_run_with_a_word(head: socket.socket) -> None:
    said: list[tuple[str, str]] = []
    gone = threading.Event()

    def lost(reason: str) -> None:
        said.append(("end", reason))
        gone.set()

    class Waits:
        workers, inside = 3, False

        def run(self, dispatcher: Any) -> None:
            head.close()
            assert gone.wait(30)

    ours = Cluster("local", lost=lost)
    ours.nodes()
    headed = Headed(Waits(), ours)
    headed.run(SimpleNamespace(fail=lambda reason: said.append(("status", reason))))  # type: ignore[arg-type]
    ours.close()
    assert (headed.workers, headed.inside, ours.lost) == (3, False, lost)
    assert [who for who, _ in said] == ["status", "end"] and said[0][1] == said[1][1]
    assert "has not answered for 1 s (ConnectionRefusedError" in said[0][1]


def test_a_head_that_comes_back_was_not_missed(head: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent for most of a second, again and again; and this process itself is stopped once."""
    asked, over, paused = 0, threading.Event(), 0.0

    def knock(address: str, patience: float) -> None:
        nonlocal asked, paused
        asked += 1
        paused += 100 if asked == 51 else 0  # as after SIGSTOP
        if asked == 100:
            over.set()
        if asked % 10 and asked != 52:
            raise OSError("silent")

    monkeypatch.setattr(cluster, "knock", knock)
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: asked / 10 + paused))
    said: list[str] = []
    ours = Cluster("local", lost=said.append)
    ours.nodes()
    assert over.wait(60)
    ours.close()
    assert not said
