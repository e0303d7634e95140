"""Two drivers on one run folder, in processes of their own: one is stopped, another takes over, the first goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from null_model import job_at, run_job, write_manifest

import batchsd
from batchsd import object_store
from batchsd.job import Job
from batchsd.ledger import Ledger
from batchsd.lock import Lock
from batchsd.revise import replace_uri
from batchsd.store import Store, open_store
from batchsd.types import InfrastructureError
from batchsd.verify import verify

MODEL = Path(batchsd.__file__).parent / "assets/tiny-scenes"
MARKER = "__batchsd/ledger/0001/00001.json"


@pytest.fixture(params=["disk", "moto"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    write_manifest(tmp_path / "prompts.parquet", [f"prompt {i}" for i in range(12)])
    made = job_at(tmp_path, MODEL)
    return made if request.param == "disk" else replace_uri(made, f"s3://{request.getfixturevalue('bucket')}/run")


def locked_run(job: Job, log: Path, store: Store) -> None:
    with Lock(store, silent=2.0, beat_every=0.2, settle=0.3) as lock:
        run_job(job, log, store=store, check_lock=lock.check)


def driver(job: Job, log: Path, change: Callable[[Store], None]) -> int:
    """A driver in a child process; it ends with the code that the command would give."""
    child = os.fork()
    if child:
        return child
    code = 9
    try:
        object_store.client.cache_clear()  # connections are not for two processes
        object_store.pool.cache_clear()
        store = open_store(job.output.uri)
        change(store)
        try:
            locked_run(job, log, store)
            code = 0
        except InfrastructureError as error:
            log.with_suffix(".error").write_text(str(error))
            code = 3
    finally:
        os._exit(code)


def stop_before(name: str, operation: str) -> Callable[[Store], None]:
    """The driver stops, whole, when it is about to do this."""

    def change(store: Store) -> None:
        real = getattr(store, operation)

        def stopping(first: Any, *rest: Any) -> Any:
            if name in str(first):
                setattr(store, operation, real)
                os.kill(os.getpid(), signal.SIGSTOP)
            return real(first, *rest)

        setattr(store, operation, stopping)

    return change


def everything(store: Store) -> dict[str, bytes | None]:
    """All that counts: a late writer may leave what nobody reads in staging."""
    mine = ("__batchsd/staging/", "__batchsd/lock.json", "__batchsd/status.json")
    return {name: store.read(name) for name, _ in store.entries("") if not name.startswith(mine)}


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        pytest.param(MARKER, "create_only", id="before its marker"),
        pytest.param("data/train-00001", "publish", id="before its publish", marks=pytest.mark.soak),
        pytest.param("staging/00001", "remove", id="before it tidies up", marks=pytest.mark.soak),
    ],
)
def test_a_stopped_driver_goes_on_after_the_end_and_changes_nothing(
    job: Job, tmp_path: Path, name: str, operation: str
) -> None:
    late = driver(job, tmp_path / "late", stop_before(name, operation))
    _, status = os.waitpid(late, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    store = open_store(job.output.uri)
    assert [marker.shard for marker in Ledger(store).markers()] == ([0] if operation == "create_only" else [0, 1])
    locked_run(job, tmp_path / "other", store)
    assert Ledger(store).succeeded()
    drawn_twice = set((tmp_path / "late").read_text().split()) & set((tmp_path / "other").read_text().split())
    assert len(drawn_twice) <= 8  # two shards were open, at most
    before = everything(store)
    os.kill(late, signal.SIGCONT)
    _, status = os.waitpid(late, 0)
    if os.waitstatus_to_exitcode(status) != 0:  # it may reach the end before it hears of the other
        assert os.waitstatus_to_exitcode(status) == 3
        assert "another run" in (tmp_path / "late.error").read_text()
    assert everything(store) == before
    Ledger(store).roll_forward()
    assert store.children("__batchsd/staging") == []
    faults: list[str] = []
    verdict = verify(job.output.uri, faults.append, lambda verdict: None)
    assert (faults, verdict.rows, verdict.missing) == ([], 12, 0)


def test_a_living_driver_is_not_disturbed(job: Job, tmp_path: Path) -> None:
    store = open_store(job.output.uri)
    with Lock(store, silent=2.0, beat_every=0.2, settle=0.3):
        other = driver(job, tmp_path / "other", lambda store: None)
        _, status = os.waitpid(other, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert f"{store.uri}: another run (process {os.getpid()}" in (tmp_path / "other.error").read_text()
    assert Ledger(store).plan() is None and not (tmp_path / "other").exists()
