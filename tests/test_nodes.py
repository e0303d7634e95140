"""The quickstart over several real raylets on this machine, while nodes leave, die and join."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import check_every_row_once, command, environment, markers, started, who_drew

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A head without CPUs, for nodes to join; its files apart from other Rays of this user."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="bray")  # short: sockets lie below it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        yield cluster
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(head: Any) -> Iterator[Any]:
    yield head
    for node in list(head.worker_nodes):
        head.remove_node(node)


def raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def workers_on(node: Any) -> set[int]:
    """Our actors among a raylet's children."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == raylet(node) and b"ray::Worker" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def shards_by(output: Path, pids: set[int]) -> int:
    return sum(count for (_, pid), count in who_drew(output).items() if pid in pids)


@pytest.fixture
def run(cluster: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    def begin(*options: str) -> Any:
        words = command(tmp_path / "out", "--address", cluster.address, *options)
        return started(words, tmp_path / "log", environment())

    return begin


def remove(cluster: Any, node: Any) -> None:
    cluster.remove_node(node)


def kill_raylet(cluster: Any, node: Any) -> None:
    os.kill(raylet(node), signal.SIGKILL)


@pytest.mark.parametrize("leave", [remove, kill_raylet])
def test_a_node_leaves_in_mid_run(leave: Callable[[Any, Any], None], cluster: Any, tmp_path: Path, run: Any) -> None:
    stays, leaves = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    output, kept, gone = tmp_path / "out", set(), set()

    def both_have_drawn() -> bool:
        kept.update(workers_on(stays))
        gone.update(workers_on(leaves))
        return bool(shards_by(output, kept) and shards_by(output, gone))

    with run() as process:
        process.until(both_have_drawn)
        leave(cluster, leaves)
        said = process.ends(0)
    print(said, who_drew(output))
    assert "2 Ray actors at" in said and "the worker's node is gone" in said
    assert "drawn alone" not in said, "rows were suspected of a node's death"
    assert len(markers(output)) == 12
    check_every_row_once(output)


def test_a_node_that_joins_in_mid_run_draws(cluster: Any, tmp_path: Path, run: Any) -> None:
    output = tmp_path / "out"
    first = cluster.add_node(num_cpus=1)
    with run("--set", "input.repeat=2") as process:
        process.until(lambda: markers(output))
        old = workers_on(first)
        late = cluster.add_node(num_cpus=1)
        process.until(lambda: workers_on(late))
        new = workers_on(late)
        said = process.ends(0)
    print(said, who_drew(output))
    assert "room for 1" in said and len(old) == len(new) == 1
    assert shards_by(output, new) > 0 and shards_by(output, old) > 0
    check_every_row_once(output, repeat=2)
