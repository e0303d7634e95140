from __future__ import annotations

import datetime
import json
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import draw, expected, lanes, plan_of, published, run_all, shards_of, workbench

from batchsd import dispatch, retrying
from batchsd.bench import Ticket, Trial
from batchsd.dispatch import Drive
from batchsd.drive import drive
from batchsd.executor import InProcess, Loss
from batchsd.ledger import Ledger, Tally
from batchsd.status import read_status
from batchsd.stop import Stop, Stopped, TooManyFailed, deadline_of
from batchsd.store import LocalStore
from batchsd.types import InfrastructureError, Progress, Record, Request, Shard, Tried

SHARDS = shards_of(8, 4)


def driver(root: Path, workers: int, shards: list[Shard] = SHARDS) -> Drive:
    ledger = Ledger(LocalStore(root))
    plan = ledger.begin(plan_of(shards))
    known = {shard.index: shard for shard in shards}
    return Drive(ledger, plan, Tally(), known, shards, workers, 0, lambda at: None, Stop(1), lambda text: None)


KILLED = Loss("crashed", "killed")


def take_all(drive: Drive, worker: int) -> list[int]:
    taken = []
    while ticket := drive.take(worker):
        taken.append(ticket.shard.index)
    return taken


def test_neighbours_go_to_one_worker_and_nothing_is_left_or_given_twice(tmp_path: Path) -> None:
    drive = driver(tmp_path, workers=3)
    first = [[t.shard.index for t in (drive.take(w), drive.take(w)) if t] for w in range(3)]
    assert first == [[0, 1], [3, 4], [6, 7]]
    assert take_all(drive, 2) == [2, 5], "an idle worker takes from the end of the others' runs"
    assert take_all(drive, 0) == take_all(drive, 1) == []
    assert not drive.over, "tickets are still out"


@pytest.mark.parametrize("workers", [1, 2, 5, 8, 20])
def test_every_shard_is_given_once_whoever_asks(tmp_path: Path, workers: int) -> None:
    drive = driver(tmp_path, workers)
    given = Counter(index for worker in reversed(range(workers)) for index in take_all(drive, worker))
    assert given == Counter(range(8))


def test_a_lost_worker_gives_its_tickets_back_under_new_nonces(tmp_path: Path) -> None:
    drive = driver(tmp_path, workers=1)
    before = [drive.take(0), drive.take(0)]
    drive.lost(0, KILLED)
    after = [drive.take(0), drive.take(0)]
    assert [t.shard for t in before if t] == [t.shard for t in after if t] == SHARDS[:2]
    assert not {t.nonce for t in before if t} & {t.nonce for t in after if t}


def test_only_shards_that_were_begun_are_blamed_and_wait_for_their_trial(tmp_path: Path) -> None:
    drive = driver(tmp_path, workers=1)
    drive.take(0), drive.take(0)
    drive.handle(0, Progress(SHARDS[0], 1, 0, ("row1", "row2"), (1, 2), good=0))
    drive.lost(0, KILLED)
    assert drive.take(0) == Trial(SHARDS[0], 0), "a row that is known to be good comes first"
    assert drive.take(0) is None, "nothing else while a row is on trial"
    drive.handle(0, Tried(SHARDS[0], 0, ok=True))
    for row in (1, 2):
        assert drive.take(0) == Trial(SHARDS[0], row)
        drive.handle(0, Tried(SHARDS[0], row, ok=True))
    assert take_all(drive, 0) == list(range(8)), "the shard that was held back, then the others"
    (log,) = (tmp_path / "__batchsd/logs").iterdir()
    assert log.name.startswith("00000.1.") and "row1, row2" in log.read_text()


def test_a_shard_whose_workers_die_of_no_row_alone_ends_the_run_by_name(tmp_path: Path) -> None:
    drive = driver(tmp_path, workers=1, shards=shards_of(1, 4))
    alone = []
    with pytest.raises(InfrastructureError, match=r"train-00000-of-00001 failed 5 times, with no row to blame.*row1"):
        for _ in range(6):
            while isinstance(order := drive.take(0), Trial):
                drive.handle(0, Tried(order.shard, order.row, ok=True))
            assert isinstance(order, Ticket)
            alone.append(order.alone)
            drive.handle(0, Progress(order.shard, 1, 0, ("row1",), (1,)))
            drive.lost(0, KILLED)
    assert alone == [False, False, False, True, False], "once with its rows one at a time: they may die of each other"


def condemned(drive: Drive, row: int, loss: Loss = KILLED) -> None:
    """Let a row of shard 0 die as often as it takes, with a good row each time before."""
    drive.take(0), drive.take(0)
    drive.handle(0, Progress(SHARDS[0], 1, 0, ("x",), (row,), good=0))
    drive.lost(0, loss)
    for _ in range(3):
        assert drive.take(0) == Trial(SHARDS[0], 0)
        drive.handle(0, Tried(SHARDS[0], 0, ok=True))
        assert drive.take(0) == Trial(SHARDS[0], row)
        drive.lost(0, loss)


def test_a_row_that_dies_alone_three_times_is_given_up(tmp_path: Path) -> None:
    drive = driver(tmp_path, workers=1)
    condemned(drive, 3)
    ticket = drive.take(0)
    assert isinstance(ticket, Ticket) and ticket.shard == SHARDS[0]
    assert {row: status for row, (status, _) in ticket.condemned.items()} == {3: "crashed"}
    assert "3 times" in ticket.condemned[3][1] and "killed" in ticket.condemned[3][1]


def test_another_driver_knows_the_verdict_and_the_cases(tmp_path: Path) -> None:
    first = driver(tmp_path, workers=1)
    condemned(first, 3, Loss("timeout", "silent"))
    first.take(0), first.take(0)
    first.handle(0, Progress(SHARDS[1], 0, 0, ("y",), (2,)))
    first.lost(0, KILLED)
    second = driver(tmp_path, workers=1)
    assert second.take(0) == Trial(SHARDS[0], 0)
    second.handle(0, Tried(SHARDS[0], 0, ok=True))
    assert second.take(0) == Trial(SHARDS[1], 2)
    second.handle(0, Tried(SHARDS[1], 2, ok=True))
    tickets = [second.take(0), second.take(0)]
    verdicts = {t.shard.index: {r: v[0] for r, v in t.condemned.items()} for t in tickets if isinstance(t, Ticket)}
    assert verdicts == {0: {3: "timeout"}, 1: {}}


@pytest.mark.parametrize("kind", ["node", "storage"])
def test_a_node_that_dies_and_a_disk_that_fails_accuse_no_row(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "WAITS", (0.0, 0.0))
    drive = driver(tmp_path, workers=1)
    for _ in range(2):
        drive.take(0), drive.take(0)
        drive.handle(0, Progress(SHARDS[0], 1, 0, ("row1", "row2"), (1, 2), good=0))
        drive.lost(0, Loss(kind, "gone"))
    assert not drive.suspects.cases
    drive.take(0)
    if kind == "node":
        drive.lost(0, Loss(kind, "gone"))
    else:
        with pytest.raises(InfrastructureError, match=r"gone \(3 tries\)"):
            drive.lost(0, Loss(kind, "gone"))


def test_progress_of_a_lost_attempt_is_taken_back(tmp_path: Path) -> None:
    drive = driver(tmp_path, workers=1)
    drive.take(0)
    drive.handle(0, Progress(SHARDS[0], 2, 1))
    assert (drive.snapshot().done, sum(drive.snapshot().failed.values())) == (3, 1)
    drive.lost(0, KILLED)
    assert (drive.snapshot().done, sum(drive.snapshot().failed.values())) == (0, 0)


def nan_at(*bad: int) -> Any:
    def record(request: Request) -> Record:
        return Record(request, "nan", "no number") if request.seed in bad else draw(request)

    return partial(lanes, record=record)


def test_the_status_is_renewed_by_the_clock_and_counts_open_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = driver(tmp_path, workers=1)
    drive.write_status("running")
    drive.take(0)
    drive.handle(0, Progress(SHARDS[0], 2, 1))
    drive.tick()
    assert drive.ledger.status()["done"] == 0, "it is not time yet"  # type: ignore[index]
    monkeypatch.setattr(dispatch, "STATUS_EVERY", 0.0)
    drive.tick()
    said = drive.ledger.status()
    assert said is not None and (said["state"], said["done"], sum(said["failed"].values())) == ("running", 3, 1)
    found = read_status(str(tmp_path))
    assert (found["state"], found["done"], found["left"]) == ("running", 0, found["rows"]), "markers alone count"


def test_too_many_failed_rows_end_the_run_and_keep_what_is_done(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(TooManyFailed, match=r"2 rows failed \(2 nan\), run.max_failed allows 1") as error:
        run_all(store, SHARDS, nan_at(1, 9), max_failed=1)
    assert error.value.exit_code == 1
    done = Ledger(store).tally().done
    assert 2 in done and 7 not in done
    with pytest.raises(TooManyFailed):
        run_all(store, SHARDS, max_failed=1)
    run_all(store, SHARDS, max_failed=2)
    assert [key for key, picture in published(tmp_path) if picture is None] == ["row1", "row9"]
    assert json.loads((tmp_path / "__batchsd/SUCCESS.json").read_text())["failed"] == {"nan": 2}


def test_too_many_in_the_last_shard_do_not_keep_the_run_from_its_end(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    total = run_all(store, SHARDS, nan_at(31), max_failed=0)
    assert (total.ok, total.failed) == (31, {"nan": 1})
    assert Ledger(store).succeeded()
    ended = json.loads((tmp_path / "__batchsd/status.json").read_text())
    assert (ended["state"], ended["exit_code"]) == ("done", 1) and "1 row failed (1 nan)" in ended["reason"]


def stopping(stop: Stop, at_row: int, slow: float = 0.0) -> Any:
    def record(request: Request) -> Record:
        if request.seed == at_row:
            stop.ask("SIGTERM", 75)
        return draw(request)

    return partial(lanes, record=record, seconds=slow)


def test_a_stop_finishes_what_is_in_flight_and_the_next_run_goes_on(tmp_path: Path) -> None:
    store, stop = LocalStore(tmp_path), Stop(grace=60)
    with pytest.raises(Stopped) as stopped:
        run_all(store, SHARDS, stopping(stop, 9), stop=stop)
    assert stopped.value.exit_code == 75
    done = Ledger(store).tally().done
    assert 2 in done and len(done) in (3, 4)
    assert list((tmp_path / "__batchsd/staging").iterdir()) == []
    assert json.loads((tmp_path / "__batchsd/status.json").read_text())["state"] == "stopped"
    run_all(store, SHARDS)
    assert published(tmp_path) == expected(SHARDS)


def test_a_stop_waits_no_longer_than_its_grace(tmp_path: Path) -> None:
    store, stop = LocalStore(tmp_path), Stop(grace=0)
    with pytest.raises(Stopped):
        run_all(store, SHARDS, stopping(stop, 9), stop=stop)
    assert 2 not in Ledger(store).tally().done
    run_all(store, SHARDS)
    assert published(tmp_path) == expected(SHARDS)


def test_a_stop_at_the_very_end_is_no_failure(tmp_path: Path) -> None:
    store, stop = LocalStore(tmp_path), Stop(grace=60)
    run_all(store, SHARDS, stopping(stop, 31), stop=stop)
    assert (tmp_path / "__batchsd/SUCCESS.json").exists()


def test_the_deadline_is_the_next_time_of_that_name() -> None:
    now = datetime.datetime(2026, 11, 22, 23, 30)

    def at(text: str) -> datetime.datetime:
        seconds = deadline_of(text, now)
        assert seconds is not None
        return datetime.datetime.fromtimestamp(seconds)

    assert deadline_of("", now) is None
    assert at("05:00") == datetime.datetime(2026, 11, 23, 5)
    assert at("23:45") == datetime.datetime(2026, 11, 22, 23, 45)
    assert at("2026-11-20T01:02:03") == datetime.datetime(2026, 11, 20, 1, 2, 3)


def test_a_run_stops_at_its_deadline(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    slow = partial(lanes, seconds=0.02)
    with pytest.raises(Stopped, match=r"run\.deadline") as stopped:
        run_all(store, SHARDS, slow, stop=Stop(60, deadline=time.time() + 0.2))
    assert stopped.value.exit_code == 75
    assert 0 < len(Ledger(store).tally().done) < 8
    run_all(store, SHARDS)
    assert published(tmp_path) == expected(SHARDS)


def test_a_driver_without_the_lock_commits_nothing_and_says_nothing(tmp_path: Path) -> None:
    ledger, lost = Ledger(LocalStore(tmp_path)), []
    plan = ledger.begin(plan_of(SHARDS))

    def record(request: Request) -> Record:
        if request.seed == 9:
            lost.append(True)
        return draw(request)

    def check_lock() -> None:
        if lost:
            raise InfrastructureError("another run")

    executor = InProcess(partial(workbench, ledger.store, partial(lanes, record=record)))
    arguments = (SHARDS, executor, Stop(1), 0, lambda at: None, lambda text: None, check_lock)
    with pytest.raises(InfrastructureError, match="another run"):
        drive(ledger, plan, Tally(), *arguments)
    assert 0 < len(ledger.tally().done) < 4
    status = ledger.status()
    assert status is not None and status["state"] == "running", "status.json is the holder's"
