"""The connection to Ray, where it does not come; on real nodes see test_nodes.py."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from batchsd.cluster import Cluster
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
