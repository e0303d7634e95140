"""The connection to Ray, where it does not come; on real nodes see test_nodes.py."""

from __future__ import annotations

from typing import Any

import pytest

from batchsd.cluster import Cluster
from batchsd.types import InfrastructureError


def test_a_cluster_that_does_not_answer_is_said() -> None:
    def connect(**_: Any) -> None:
        raise ConnectionError("no route to host")

    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", connect)
        with pytest.raises(
            InfrastructureError, match="'head:6379' does not start: ConnectionError: no route"
        ):
            Cluster("head:6379").nodes()
