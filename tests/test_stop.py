"""Signals and the clock, sent to real processes that draw with the worker inside."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from fakes import draw, expected, lanes, published, run_all, shards_of

from batchsd.cli.terminal import signals
from batchsd.ledger import Ledger
from batchsd.stop import Stop
from batchsd.store import LocalStore
from batchsd.types import BatchsdError, Record, Request

SHARDS = shards_of(8, 4)
QUICK, STUCK = 0.05, 60.0  # seconds a row


def begin(
    root: Path,
    grace: float,
    seconds: float,
    deadline: float | None = None,
    record: Callable[[Request], Record] | None = None,
) -> int:
    """A run in a process of its own; from its ninth row on each takes `seconds`, or what `record` takes."""

    def slow(request: Request) -> Record:
        time.sleep(seconds if request.seed >= 8 else 0)
        return draw(request)

    child = os.fork()
    if child:
        return child
    code = 1
    try:
        stop = Stop(grace, None if deadline is None else time.time() + deadline)
        with signals(stop):
            run_all(LocalStore(root), SHARDS, partial(lanes, record=record or slow, width=2), stop=stop)
        code = 0
    except BatchsdError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def wait_for_two_shards(root: Path) -> None:
    until = time.monotonic() + 30
    while not (root / "__batchsd/ledger/0001/00001.json").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.2)  # by now it is in a row of the third


def ended(child: int, root: Path) -> int:
    """Its exit code; what it leaves is whole, and the next run goes on from it."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = json.loads((root / "__batchsd/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", code)
    done = Ledger(LocalStore(root)).tally().done
    assert {0, 1} <= done and len(done) < 8
    assert not list((root / "__batchsd").glob("suspects/*")), "nobody died of a row"
    run_all(LocalStore(root), SHARDS)
    assert published(root) == expected(SHARDS)
    return code


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda x: str(x)
)
def test_a_signal_lets_the_shards_in_flight_end(tmp_path: Path, number: int, code: int) -> None:
    child = begin(tmp_path, 30, QUICK)
    wait_for_two_shards(tmp_path)
    os.kill(child, number)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert 2 in Ledger(LocalStore(tmp_path)).tally().done
    assert list((tmp_path / "__batchsd/staging").iterdir()) == []
    assert ended(child, tmp_path) == code


def test_a_row_that_takes_longer_than_the_grace_is_left(tmp_path: Path) -> None:
    child = begin(tmp_path, 0.2, STUCK)
    wait_for_two_shards(tmp_path)
    began = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert ended(child, tmp_path) == 75
    assert time.monotonic() - began < STUCK / 2, "it waited for the row"


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    child = begin(tmp_path, 300, STUCK)
    wait_for_two_shards(tmp_path)
    began = time.monotonic()
    os.kill(child, signal.SIGINT)
    time.sleep(0.3)
    os.kill(child, signal.SIGINT)
    assert ended(child, tmp_path) == 130
    assert time.monotonic() - began < STUCK / 2


def test_a_third_signal_ends_what_swallows_the_second(tmp_path: Path) -> None:
    def deaf(request: Request) -> Record:
        until = time.monotonic() + (STUCK if request.seed >= 8 else 0)
        while time.monotonic() < until:
            try:
                time.sleep(STUCK)
            except BaseException:  # as a library may
                continue
        return draw(request)

    child = begin(tmp_path, 300, 0, record=deaf)
    wait_for_two_shards(tmp_path)
    began = time.monotonic()
    for _ in range(3):
        os.kill(child, signal.SIGTERM)
        time.sleep(0.3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert time.monotonic() - began < STUCK / 2
    run_all(LocalStore(tmp_path), SHARDS)
    assert published(tmp_path) == expected(SHARDS)


def test_the_deadline_needs_nobody_to_look(tmp_path: Path) -> None:
    assert ended(begin(tmp_path, 0.2, STUCK, deadline=2), tmp_path) == 75
