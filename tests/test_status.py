from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from fakes import plan_of, run_all, shards_of

from batchsd.ledger import Ledger
from batchsd.lock import LOCK, here
from batchsd.status import lines, read_status, watch
from batchsd.stop import Stop, Stopped
from batchsd.store import LocalStore
from batchsd.types import UsageError

SHARDS = shards_of(4, 5)


def said(root: Path, **changes: object) -> None:
    path = root / "__batchsd/status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_from_the_plan_to_the_end(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run of batchsd"):
        read_status(str(tmp_path))
    Ledger(LocalStore(tmp_path)).begin(plan_of(SHARDS))
    assert read_status(str(tmp_path))["state"] == "planned"
    stop = Stop(60)
    stop.ask("SIGTERM", 75)
    with pytest.raises(Stopped):
        run_all(LocalStore(tmp_path), SHARDS, stop=stop)
    found = read_status(str(tmp_path))
    assert (found["state"], found["exit_code"], found["done"], found["left"]) == ("stopped", 75, 0, 20)
    assert "SIGTERM" in found["reason"]
    run_all(LocalStore(tmp_path), SHARDS)
    found = read_status(str(tmp_path))
    assert (found["state"], found["exit_code"], found["done"], found["left"]) == ("done", 0, 20, 0)
    assert (found["shards"], found["shards_done"]) == (4, 4)


def test_a_driver_that_says_no_more_is_dead(tmp_path: Path) -> None:
    run_all(LocalStore(tmp_path), SHARDS)
    (tmp_path / "__batchsd/ledger/0001/00003.json").unlink()
    said(tmp_path, state="running", updated=time.time() - 20, pictures_per_second=0.5)
    found = read_status(str(tmp_path))
    assert (found["state"], found["seconds_left"]) == ("running", 10)
    said(tmp_path, updated=time.time() - 1000)
    found = read_status(str(tmp_path))
    assert found["state"].startswith("dead since 2") and found["seconds_left"] is None


def test_a_driver_that_is_no_more_is_dead_at_once_and_a_beating_lock_is_alive(tmp_path: Path) -> None:
    run_all(LocalStore(tmp_path), SHARDS)
    (tmp_path / "__batchsd/ledger/0001/00003.json").unlink()
    said(tmp_path, state="running", updated=time.time() - 1000)

    def lock(**changes: object) -> None:
        values = {**here(), "nonce": "n", "beat": 1, "at": time.time(), **changes}
        LocalStore(tmp_path).put(LOCK, json.dumps(values).encode())

    lock()
    assert read_status(str(tmp_path))["state"] == "running"
    child = subprocess.Popen(["true"])
    child.wait()
    lock(pid=child.pid)
    assert read_status(str(tmp_path))["state"].startswith("dead since 2")


def test_a_watch_looks_until_the_run_ends(tmp_path: Path) -> None:
    run_all(LocalStore(tmp_path), SHARDS)
    said(tmp_path, state="running", updated=time.time(), pictures_per_second=0.5)
    marker = tmp_path / "__batchsd/ledger/0001/00003.json"
    kept, waits = marker.read_bytes(), []
    marker.unlink()

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            marker.write_bytes(kept)
        else:
            said(tmp_path, state="stopped", reason="stopped by SIGTERM")

    found = list(watch(str(tmp_path), sleep))
    assert [(status["state"], status["left"]) for status in found] == [("running", 5), ("running", 0), ("stopped", 0)]
    assert all(seconds >= 5 for seconds in waits)
    assert lines(found[0]) == [
        "running: 15 of 20 rows done, 5 left, 0 failed", "shards: 3 of 4", "0.5 pictures/s, 10 s left"
    ]  # fmt: skip
    assert lines(found[2])[-1] == "stopped by SIGTERM"


def test_a_driver_that_died_after_its_last_shard_was_done(tmp_path: Path) -> None:
    run_all(LocalStore(tmp_path), SHARDS)
    said(tmp_path, state="running", updated=time.time() - 1000)
    assert read_status(str(tmp_path))["state"] == "done"
