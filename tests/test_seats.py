"""The protocol on real Ray actors, with the fakes of `fakes.py` in them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fakes
import pytest
from fakes import draw, expected, lanes, published, run_all, shards_of, workbench

from batchsd import plugins, seats
from batchsd.bench import Source, Workbench
from batchsd.cluster import Cluster
from batchsd.deadlines import Patience
from batchsd.executor import Dispatcher, Executor
from batchsd.ledger import Ledger
from batchsd.seats import RayActors, Reserve
from batchsd.store import LocalStore
from batchsd.types import (
    Event,
    InfrastructureError,
    Progress,
    Record,
    Request,
    Shard,
    UsageError,
)

SHARDS = shards_of(4, 6)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    import ray.cloudpickle

    # The actors cannot import test files: these travel as code.
    for module in (fakes, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    ours = Cluster("local", 2)
    (node,) = ours.nodes()
    assert node["CPU"] == 2
    yield ours
    ours.close()


def actors(build: Callable[[], Workbench], workers: int = 2, seconds: float = 60) -> RayActors:
    return RayActors(build, workers, Reserve(), lambda text: None, Patience(seconds, seconds))


def signing(pids: Path, sources: Iterable[Source | None]) -> Iterator[tuple[Shard, Record]]:
    """Slow enough to be killed; writes down who draws which shard."""
    for shard, record in lanes(sources, width=2, seconds=0.1):
        (pids / str(shard.index)).write_text(str(os.getpid()))
        yield shard, record


class Killer:
    """Passes a dispatcher's calls on, and kills the worker at the second row that it reports of one shard."""

    def __init__(self, dispatcher: Dispatcher, pids: Path, shard: int) -> None:
        self._inner, self._pids, self._shard = dispatcher, pids, shard
        self._events = 0
        self.killed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def handle(self, worker: int, event: Event) -> None:
        self._inner.handle(worker, event)
        if event.shard.index != self._shard or not isinstance(event, Progress) or not event.ok:
            return
        self._events += 1
        if self._events == 2:
            os.kill(int((self._pids / str(self._shard)).read_text()), signal.SIGKILL)
            self.killed = True


class WithKiller:
    inside = False

    def __init__(self, inner: Executor, pids: Path, shard: int) -> None:
        self.workers = inner.workers
        self._inner, self._pids, self._shard = inner, pids, shard

    def run(self, dispatcher: Dispatcher) -> None:
        killer = Killer(dispatcher, self._pids, self._shard)
        self._inner.run(killer)
        assert killer.killed


def test_an_actor_killed_in_a_shard(cluster: Cluster, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    store = LocalStore(tmp_path / "run")
    said: list[str] = []
    executor = WithKiller(actors(partial(workbench, store, partial(signing, pids))), pids, shard=1)
    run_all(store, SHARDS, executor=executor, log=said.append)
    assert published(tmp_path / "run") == expected(SHARDS)
    attempts = {marker.shard: marker.attempt for marker in Ledger(store).markers()}
    assert attempts[1] == 2 and attempts[2] == attempts[3] == 1
    assert len({(pids / str(i)).read_text() for i in range(4)}) >= 2, "one actor did all"
    (line,) = [text for text in said if "train-00001-of-00004" in text]
    assert "the worker's process was killed or crashed" in line


def with_poison(kills: str, hangs: str, sources: Iterable[Source | None]) -> Iterator[tuple[Shard, Record]]:
    def record(request: Request) -> Record:
        if request.key == kills:
            time.sleep(0.3)  # a real network call takes as long: what was announced has left by then
            os.kill(os.getpid(), signal.SIGKILL)
        if request.key == hangs:
            time.sleep(600)
        return draw(request)

    return lanes(sources, width=2, record=record)


def test_rows_that_kill_or_hang_their_worker_become_error_rows(cluster: Cluster, tmp_path: Path) -> None:
    store, said = LocalStore(tmp_path), []
    build = partial(workbench, store, partial(with_poison, "row13", "row3"))
    run_all(store, SHARDS, executor=actors(build, seconds=3), max_failed=2, log=said.append)
    rows = dict(published(tmp_path))
    assert len(rows) == len(published(tmp_path)) == 24
    assert [key for key, picture in rows.items() if picture is None] == ["row3", "row13"]
    assert rows.items() >= {pair for pair in expected(SHARDS) if pair[0] not in ("row3", "row13")}
    assert [dict(marker.failed) for marker in Ledger(store).markers()] == [{"timeout": 1}, {}, {"crashed": 1}, {}]
    assert sum("given up" in line for line in said) == 2


def refuses() -> Workbench:
    raise UsageError("unet: 3 tensors unused, first 'time_embed.4.bias'")


def crashes() -> Workbench:
    os._exit(1)


def test_a_users_error_in_an_actor_is_the_users(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^unet: 3 tensors unused, first 'time_embed.4.bias'$"):
        run_all(LocalStore(tmp_path), SHARDS, executor=actors(refuses, 1))


def test_workers_that_never_come_end_the_run(cluster: Cluster, tmp_path: Path) -> None:
    said: list[str] = []
    executor = RayActors(refuses, 1, Reserve(cpus=64, wait=3), said.append)
    with pytest.raises(InfrastructureError, match=r"no worker in 3 s \(ray.wait\): each wants 64 CPU; .* 2 CPU"):
        run_all(LocalStore(tmp_path), SHARDS, executor=executor)


def test_a_run_begins_with_the_workers_that_come_and_says_who_is_missing(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seats, "SAY_EVERY", 0.5)
    said: list[str] = []
    build = partial(workbench, LocalStore(tmp_path), partial(lanes, width=2, seconds=0.1))
    run_all(LocalStore(tmp_path), SHARDS, executor=RayActors(build, 3, Reserve(cpus=1), said.append))
    assert published(tmp_path) == expected(SHARDS)
    missing = "2 of 3 workers are up, waiting for the others: each wants 1 CPU, the cluster has 0 GPU and 2 CPU"
    assert said.count(missing) >= 2, "it is said again and again"


def test_room_that_comes_later_is_used(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "SAY_EVERY", 0.5)
    pids = tmp_path / "pids"
    pids.mkdir()
    store = LocalStore(tmp_path / "run")
    build = partial(workbench, store, partial(signing, pids))
    shards = shards_of(12, 6)
    reserve = Reserve(cpus=1, room=lambda: 2 if any(pids.iterdir()) else 1)
    run_all(store, shards, executor=RayActors(build, 1, reserve, lambda text: None))
    assert published(tmp_path / "run") == expected(shards)
    assert len({path.read_text() for path in pids.iterdir()}) == 2


def test_actors_that_cannot_start_end_the_run(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="no worker can start, 3 tries: the worker's process was"):
        run_all(LocalStore(tmp_path), SHARDS, executor=actors(crashes, 1))


PLUGIN = """
import batchsd
from batchsd.types import Sink

class Shouting:
    def open(self, folder, name, schema):
        return Writer(folder / f"{name}.txt")

class Writer:
    def __init__(self, path):
        self.path, self.lines = path, []
    def add(self, record):
        self.lines.append(record.request.prompt.upper())
    def close(self):
        self.path.write_text("\\n".join(self.lines))

@batchsd.hookimpl
def register_sinks():
    return {"shouting": Shouting()}
"""


def with_plugin(store: LocalStore, sources: tuple[Any, ...]) -> Workbench:
    registry = plugins.build(sources, Path("/nowhere"))
    return workbench(store, sink=registry.sinks["shouting"])  # type: ignore[arg-type]


def test_a_one_file_plugin_travels_by_content(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "shouting.py"
    file.write_text(PLUGIN)
    sources = plugins.pack([str(file)], tmp_path)
    file.unlink()
    store = LocalStore(tmp_path / "run")
    run_all(store, SHARDS, executor=actors(partial(with_plugin, store, sources)))
    written = "\n".join(path.read_text() for path in sorted((tmp_path / "run/data").iterdir()))
    assert written.split() == [key.upper() for key, _ in expected(SHARDS)]
