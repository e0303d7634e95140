"""The quickstart over several real raylets on this machine, while nodes leave, die and join."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fakes
import pytest
from fakes import draw, expected, lanes, published, run_all, shards_of, workbench
from runs import ROOT, SLOW, check_every_row_once, command, environment, markers, started, who_drew

from batchsd.bench import Source
from batchsd.job import Job, load
from batchsd.place import Place
from batchsd.seats import RayActors, Reserve
from batchsd.store import LocalStore
from batchsd.types import Record, Request, Shard

pytestmark = pytest.mark.cluster

LONG = 6  # pictures a row, and a shard: more than an idle machine draws while a node comes or goes


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

    with run("--set", f"input.repeat={LONG}") as process:
        process.until(both_have_drawn)
        leave(cluster, leaves)
        said = process.ends(0)
    print(said, who_drew(output))
    assert "2 Ray actors at" in said and "the worker's node is gone" in said
    assert "drawn alone" not in said, "rows were suspected of a node's death"
    assert len(markers(output)) == 48
    check_every_row_once(output, LONG)


def test_a_node_that_has_just_died_is_asked_nothing(cluster: Any, tmp_path: Path, run: Any) -> None:
    """Ray still counts it; the questions before the first shard find out."""
    stays, dead = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    kill_raylet(cluster, dead)
    with run() as process:
        process.until(lambda: markers(tmp_path / "out"))
        alive = workers_on(stays)
        process.ends(0)
    assert len(alive) == 1 and shards_by(tmp_path / "out", alive) == 12
    check_every_row_once(tmp_path / "out")


def test_a_node_that_joins_in_mid_run_draws(cluster: Any, tmp_path: Path, run: Any) -> None:
    output = tmp_path / "out"
    first = cluster.add_node(num_cpus=1)
    with run("--set", f"input.repeat={LONG}") as process:
        process.until(lambda: markers(output))
        old = workers_on(first)
        late = cluster.add_node(num_cpus=1)
        process.until(lambda: workers_on(late))
        new = workers_on(late)
        said = process.ends(0)
    print(said, who_drew(output))
    assert "room for 1" in said and len(old) == len(new) == 1
    assert shards_by(output, new) > 0 and shards_by(output, old) > 0
    check_every_row_once(output, LONG)


def together(folder: Path, count: int, sources: Iterable[Source | None]) -> Iterator[tuple[Shard, Record]]:
    """Draws nothing before `count` workers are there; each says below which raylet it is."""
    (folder / f"{os.getppid()}.{os.getpid()}").touch()

    def record(request: Request) -> Record:
        end = time.monotonic() + 120
        while len(list(folder.iterdir())) < count and time.monotonic() < end:
            time.sleep(0.1)
        return draw(request)

    return lanes(sources, width=2, record=record)


def gpu_job(folder: Path, workers: str, each: float) -> Job:
    sets = (f"output.uri={folder}/out", "model.device=cuda", f"ray.workers={workers}", f"ray.gpus_per_worker={each}")
    return load(ROOT / "jobs" / "quickstart.toml", sets, {})


def seated(cluster: Any, folder: Path, job: Job, count: int) -> Counter[int]:
    """Runs fakes where GPUs are only said to be; workers by raylet."""
    import ray.cloudpickle

    for module in (fakes, sys.modules[__name__]):  # the actors cannot import test files: these travel as code
        ray.cloudpickle.register_pickle_by_value(module)
    store, there = LocalStore(folder / "run"), folder / "there"
    there.mkdir()
    with Place(job, cluster.address) as place:
        crew = place.crew
        reserve = Reserve(crew.cpus, crew.gpus, crew.threads, job.ray.wait)
        build = partial(workbench, store, partial(together, there, count))
        run_all(store, shards_of(2 * count, 2), executor=RayActors(build, crew.workers, reserve, print))
    assert published(folder / "run") == expected(shards_of(2 * count, 2))
    return Counter(int(path.name.partition(".")[0]) for path in there.iterdir())


@pytest.mark.parametrize(("each", "workers"), [(0.5, (2, 4)), (1, (1, 2)), (2, (0, 1))])
def test_gpus_and_shares_of_them_on_two_types_of_nodes(
    each: float, workers: tuple[int, int], cluster: Any, tmp_path: Path
) -> None:
    small, large = cluster.add_node(num_cpus=1, num_gpus=1), cluster.add_node(num_cpus=2, num_gpus=2)
    found = seated(cluster, tmp_path, gpu_job(tmp_path, "auto", each), sum(workers))
    assert (found[raylet(small)], found[raylet(large)]) == workers and found.total() == sum(workers)


def test_a_cluster_grows_from_zero(cluster: Any, tmp_path: Path) -> None:
    """Nothing has a GPU when the run begins; a node comes because two workers wait for one."""

    def waiting() -> int:
        return len(cluster.global_state.actor_table(None, actor_state_name="PENDING_CREATION"))

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(seated, cluster, tmp_path, gpu_job(tmp_path, "2", 0.5), 2)
        while waiting() < 2:
            assert not found.done(), found.result()
            time.sleep(0.5)
        added = cluster.add_node(num_cpus=1, num_gpus=1)  # in the main thread: Ray's nodes want it
        assert found.result(SLOW) == {raylet(added): 2}
