"""Two drivers: one waits, one is taken over, one finds out."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from batchsd.lock import LOCK, Lock, gone, here, read_lock
from batchsd.store import LocalStore
from batchsd.types import InfrastructureError

FAST = {"silent": 0.5, "beat_every": 0.05, "settle": 0.1}


def dead_pid() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def leave(root: Path, **changes: object) -> None:
    """A lock as a driver leaves it that was killed."""
    values = {**here(), "nonce": "other", "beat": 7, "at": 0.0, **changes}
    LocalStore(root).put(LOCK, json.dumps(values).encode())


def test_it_is_held_for_the_block_and_given_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Lock(store, **FAST) as lock:
        held = read_lock(store)
        assert held is not None and held["pid"] == os.getpid()
        time.sleep(0.3)
        lock.check()
        again = read_lock(store)
        assert again is not None and again["beat"] > held["beat"], "no heartbeat"
    assert read_lock(store) is None


def test_a_live_holder_is_named_and_not_disturbed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Lock(store, **FAST) as first:
        with pytest.raises(InfrastructureError, match=f"process {os.getpid()} on ") as error:
            Lock(store, **FAST).__enter__()
        assert error.value.exit_code == 3
        first.check()
    with Lock(store, **FAST):
        pass


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    leave(tmp_path, pid=dead_pid())
    began = time.monotonic()
    with Lock(LocalStore(tmp_path), silent=60, beat_every=0.05, settle=0.1):
        assert time.monotonic() - began < 5


def test_a_silent_holder_elsewhere_is_taken_over_after_a_while(tmp_path: Path) -> None:
    leave(tmp_path, space="another machine", pid=1)
    began = time.monotonic()
    with Lock(LocalStore(tmp_path), **FAST) as lock:
        assert time.monotonic() - began >= FAST["silent"]
        lock.check()


def test_who_was_taken_over_finds_out_and_leaves_the_lock_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Lock(store, **FAST) as lock:
        leave(tmp_path)  # as another driver would, had we been stopped for a minute
        time.sleep(0.3)
        with pytest.raises(InfrastructureError, match="another run"):
            lock.check()
    standing = read_lock(store)
    assert standing is not None and standing["nonce"] == "other"


def test_of_many_that_take_over_one_holds(tmp_path: Path) -> None:
    leave(tmp_path, pid=dead_pid())
    holding: list[Lock] = []
    start, end = threading.Barrier(6), threading.Event()

    def race() -> None:
        start.wait()
        try:
            with Lock(LocalStore(tmp_path), silent=0.5, beat_every=0.05, settle=0.4) as lock:
                holding.append(lock)
                end.wait(5)
        except InfrastructureError:
            return

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    assert len([lock for lock in holding if holds(lock)]) == 1
    end.set()
    for thread in threads:
        thread.join()


def holds(lock: Lock) -> bool:
    try:
        lock.check()
    except InfrastructureError:
        return False
    return True


def test_a_process_elsewhere_is_never_said_to_be_gone() -> None:
    assert gone({**here(), "pid": dead_pid()})
    assert not gone(here())
    assert not gone({**here(), "pid": dead_pid(), "space": "another machine"})
