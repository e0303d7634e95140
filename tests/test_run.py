from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import (
    FakeSink,
    FakeWriter,
    draw,
    expected,
    lanes,
    published,
    read_rows,
    run_all,
    shards_of,
    workbench,
)

from batchsd.bench import Drained, Ticket, Workbench
from batchsd.executor import InProcess
from batchsd.ledger import Ledger
from batchsd.run import work
from batchsd.store import LocalStore
from batchsd.types import InfrastructureError, Progress, Record, Request, Shard, ShardResult, UsageError
from batchsd.writer import check_staged

SHARDS = shards_of(4, 6)


def tickets(shards: list[Shard]) -> Any:
    left = [Ticket(shard, f"nonce{shard.index}") for shard in reversed(shards)]

    def take(wait: bool) -> Ticket:
        if not left:
            raise Drained
        return left.pop()

    return take


def test_rows_finish_in_any_order_and_are_written_in_theirs(tmp_path: Path) -> None:
    finished = []

    def generate(sources: Any) -> Any:
        for shard, record in lanes(sources):
            finished.append(record.request.key)
            yield shard, record

    run_all(LocalStore(tmp_path), SHARDS, generate)
    keys = [key for key, _ in expected(SHARDS)]
    assert finished != keys and sorted(finished) == sorted(keys)
    assert published(tmp_path) == expected(SHARDS)


def test_the_engine_is_one_stream_over_all_shards_with_two_open_at_most(tmp_path: Path) -> None:
    begun: list[int] = []
    done: list[int] = []
    mixed = False
    for event in work(workbench(LocalStore(tmp_path)), tickets(SHARDS), lambda progress: None):
        if event.shard.index not in begun:
            begun.append(event.shard.index)
            mixed |= len(begun) - len(done) == 2
        if isinstance(event, ShardResult):
            done.append(event.shard.index)
        assert len(begun) - len(done) <= 2
    assert begun == [0, 1, 2, 3] and sorted(done) == begun
    assert mixed, "no shard began before the last one ended"


def test_an_engine_that_asks_for_a_third_shard_is_told_that_there_is_none_now(tmp_path: Path) -> None:
    answers = []

    def greedy(sources: Any) -> Iterator[tuple[Shard, Record]]:
        held = []
        for source in sources:
            answers.append(source and source[0].index)
            if source is not None:
                held.append(source)
            else:
                shard, rows = held.pop(0)
                yield from [(shard, draw(request)) for request in rows]
        for shard, rows in held:
            yield from [(shard, draw(request)) for request in rows]

    list(work(workbench(LocalStore(tmp_path), greedy), tickets(SHARDS), lambda progress: None))
    assert answers == [0, 1, None, 2, None, 3, None]


def test_the_worker_waits_for_tickets_only_when_idle(tmp_path: Path) -> None:
    asked: list[tuple[bool, int]] = []
    left = [Ticket(shard, f"nonce{shard.index}") for shard in reversed(SHARDS)]
    open_now = 0

    def take(wait: bool) -> Ticket | None:
        nonlocal open_now
        asked.append((wait, open_now))
        if not left:
            raise Drained
        if not wait:
            return None
        open_now += 1
        return left.pop()

    for event in work(workbench(LocalStore(tmp_path)), take, lambda progress: None):
        open_now -= isinstance(event, ShardResult)
    assert {wait == (count == 0) for wait, count in asked} == {True}
    assert (False, 1) in asked


def test_a_row_is_announced_before_it_is_drawn(tmp_path: Path) -> None:
    announced: set[str] = set()

    def record(request: Request) -> Record:
        assert request.key in announced
        return draw(request)

    bench = workbench(LocalStore(tmp_path), partial(lanes, record=record))
    list(work(bench, tickets(SHARDS), lambda progress: announced.update(progress.in_flight)))
    assert announced == {key for key, _ in expected(SHARDS)}


def test_a_result_says_what_is_in_the_files(tmp_path: Path) -> None:
    def some_fail(request: Request) -> Record:
        return Record(request, "nan", "no number") if request.seed % 5 == 0 else draw(request)

    bench = workbench(LocalStore(tmp_path), partial(lanes, record=some_fail))
    events = list(work(bench, tickets(SHARDS[:1]), lambda progress: None))
    result = events[-1]
    assert isinstance(result, ShardResult)
    assert (result.rows, result.ok, dict(result.failed)) == (6, 4, {"nan": 2})
    progress = [event for event in events if isinstance(event, Progress)]
    assert (sum(p.ok for p in progress), sum(p.failed for p in progress)) == (4, 2)
    assert progress[-1].in_flight == ()
    (file,) = result.files
    staged = tmp_path / "__batchsd/staging/00000.nonce0" / file.name
    assert file.name == "train-00000-of-00004.parquet" and staged.stat().st_size == file.bytes
    assert pq.read_table(staged).column("status").to_pylist() == ["nan", "ok", "ok", "ok", "ok", "nan"]


class LosesARow(FakeSink):
    def open(self, folder: Path, name: str, schema: pa.Schema) -> FakeWriter:
        writer = super().open(folder, name, schema)
        writer.add = lambda record: FakeWriter.add(writer, record) if record.request.index else None  # type: ignore
        return writer


def test_a_short_table_is_never_handed_in(tmp_path: Path) -> None:
    bench = workbench(LocalStore(tmp_path), sink=LosesARow())
    with pytest.raises(RuntimeError, match="1 files with 5 rows, not 6"):
        list(work(bench, tickets(SHARDS), lambda progress: None))


def test_a_sink_that_leaves_nothing_is_found(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="0 files"):
        check_staged(tmp_path, 3)


@pytest.mark.parametrize("rows", [5, 7])
def test_a_manifest_of_another_length_is_found(tmp_path: Path, rows: int) -> None:
    def read(shard: Shard) -> Iterator[Request]:
        return read_rows(Shard(1, shard.index, 4, 0, shard.start, rows))

    bench = workbench(LocalStore(tmp_path))
    other = Workbench(bench.generate, read, 1, bench.sink, bench.schema, bench.store)
    with pytest.raises(RuntimeError, match=f"{rows} rows read, 6 planned"):
        list(work(other, tickets(SHARDS), lambda progress: None))


def test_an_engine_that_drops_rows_is_found(tmp_path: Path) -> None:
    def lazy(sources: Any) -> Any:
        return (pair for pair in lanes(sources) if pair[1].request.index != 3)

    with pytest.raises(RuntimeError, match="rows missing: train-00000-of-00004"):
        list(work(workbench(LocalStore(tmp_path), lazy), tickets(SHARDS[:1]), lambda progress: None))


# -- the executor in this process ----------------------------------------------------------------------------


def test_a_worker_that_fails_is_built_anew_and_the_marker_says_so(tmp_path: Path) -> None:
    built, raised = [], []

    def record(request: Request) -> Record:
        if request.key == "row8" and not raised:
            raised.append(request.key)
            raise RuntimeError("the device is gone")
        return draw(request)

    store, said = LocalStore(tmp_path), []
    executor = InProcess(lambda: built.append(1) or workbench(store, partial(lanes, record=record)))  # type: ignore
    run_all(store, SHARDS, executor=executor, log=said.append)
    assert published(tmp_path) == expected(SHARDS)
    assert len(built) == 2
    assert Ledger(store).tally().ok == 24
    assert [m.attempt for m in Ledger(store).markers()][1] == 2
    assert "train-00001-of-00004: attempt 1 failed" in said[0] and "the device is gone" in said[0]
    (log,) = (tmp_path / "__batchsd/logs").glob("00001.1.*.txt")
    assert "Traceback" in log.read_text() and "row8" in log.read_text()


def test_a_row_that_makes_the_engine_raise_becomes_an_error_row(tmp_path: Path) -> None:
    def record(request: Request) -> Record:
        if request.key == "row8":
            raise RuntimeError("the device is gone")
        return draw(request)

    run_all(LocalStore(tmp_path / "whole"), SHARDS)
    store, said = LocalStore(tmp_path / "run"), []
    run_all(store, SHARDS, partial(lanes, record=record), max_failed=1, log=said.append)
    rows = published(tmp_path / "run")
    assert [row for row in rows if row[0] != "row8"] == [row for row in expected(SHARDS) if row[0] != "row8"]
    assert ("row8", None) in rows
    for name in ("00000", "00002", "00003"):
        path = f"data/train-{name}-of-00004.parquet"
        assert (tmp_path / "run" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    assert json.loads((tmp_path / "run/__batchsd/SUCCESS.json").read_text())["failed"] == {"error": 1}
    assert any("row 2, alone: given up, its status is error" in line for line in said)
    logs = [path.read_text() for path in (tmp_path / "run/__batchsd/logs").glob("00001.*")]
    assert len(logs) == 4 and all("the device is gone" in log for log in logs)
    assert list((tmp_path / "run/__batchsd/suspects").iterdir()) == []


def test_rows_that_fall_only_together_are_drawn_one_by_one(tmp_path: Path) -> None:
    flying: set[str] = set()

    def generate(sources: Any) -> Any:
        for shard, record in lanes(sources):
            flying.discard(record.request.key)
            yield shard, record

    def read(shard: Shard) -> Iterator[Request]:
        for request in read_rows(shard):
            flying.add(request.key)
            if {"row8", "row9"} <= flying:
                flying.clear()
                raise RuntimeError("too much at once")
            yield request

    store = LocalStore(tmp_path)
    bench = workbench(store, generate)
    run_all(store, SHARDS, executor=InProcess(lambda: replace(bench, read=read)))
    assert published(tmp_path) == expected(SHARDS)


def test_a_worker_that_cannot_start_ends_the_run_after_three_tries(tmp_path: Path) -> None:
    tries = []

    def build() -> Workbench:
        tries.append(1)
        raise RuntimeError("no such library")

    with pytest.raises(
        InfrastructureError, match="no worker can start, 3 tries: RuntimeError: no such library"
    ):
        run_all(LocalStore(tmp_path), SHARDS, executor=InProcess(build))
    assert len(tries) == 3


def test_a_users_error_in_a_worker_passes_at_once(tmp_path: Path) -> None:
    tries = []

    def build() -> Workbench:
        tries.append(1)
        raise UsageError("unet: 3 tensors unused")

    with pytest.raises(UsageError, match="3 tensors unused"):
        run_all(LocalStore(tmp_path), SHARDS, executor=InProcess(build))
    assert len(tries) == 1
