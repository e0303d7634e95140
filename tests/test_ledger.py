"""Every row exactly once, whatever dies: a run is killed at each storage operation in turn, and run again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fakes import (
    FakeSink,
    FakeWriter,
    expected,
    lanes,
    plan_of,
    published,
    run_all,
    shards_of,
    workbench,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batchsd.bench import Drained, Ticket
from batchsd.executor import InProcess
from batchsd.ledger import Ledger, staging_folder
from batchsd.run import work
from batchsd.store import LocalStore
from batchsd.types import Event, InfrastructureError, OutputFile, Record, ShardResult, UsageError

SHARDS = shards_of(3, 4)
STEPS = ("create_only", "put", "publish", "remove", "scratch", "hand_in")


class StepStore(LocalStore):
    """Calls `on_step(name, argument, before?)` around each operation that changes something."""

    def __init__(self, root: Path, on_step: Callable[[str, str, bool], None]) -> None:
        super().__init__(root)
        for step in STEPS:
            setattr(self, step, partial(self._around, on_step, step, getattr(self, step)))

    @staticmethod
    def _around(on_step: Any, step: str, operation: Any, name: str, *rest: Any) -> Any:
        on_step(step, name, True)
        result = operation(name, *rest)
        on_step(step, name, False)
        return result


class TwoFileSink(FakeSink):
    """A table and a caption file for each shard."""

    def open(self, folder: Path, name: str, schema: pa.Schema) -> TwoFileWriter:
        return TwoFileWriter(folder / f"{name}.parquet", schema)


class TwoFileWriter(FakeWriter):
    def add(self, record: Record) -> None:
        super().add(record)
        with self.path.with_suffix(".txt").open("a") as file:
            file.write(f"{record.request.prompt}\n")


def run_with(store: LocalStore, sink: FakeSink) -> None:
    run_all(store, SHARDS, executor=InProcess(lambda: workbench(store, sink=sink)), max_failed=12)


def run_and_die(root: Path, sink: FakeSink, step: int) -> bool:
    """The run in a child process that dies before or after its n-th operation; False where it has fewer."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(*_: object) -> None:
            nonlocal count
            count += 1
            if count > step:
                os._exit(9)

        try:
            run_with(StepStore(root, die), sink)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def check_whole(root: Path, condemned: int = 0) -> None:
    """All rows once, in order, with their pictures, but for at most so many that are held to have killed their run."""
    found, wanted = published(root), expected(SHARDS)
    assert [key for key, _ in found] == [key for key, _ in wanted]
    missing = [row for row, right in zip(found, wanted, strict=True) if row != right]
    assert len(missing) <= condemned and all(picture is None for _, picture in missing)
    for captions, shard in zip(sorted((root / "data").glob("*.txt")), SHARDS, strict=False):
        assert captions.read_text().split() == [f"row{shard.start + i}" for i in range(shard.count)]
    ours = root / "__batchsd"
    assert [p.name for p in sorted((ours / "ledger/0001").glob("*.json"))] == [
        f"{i:05d}.json" for i in range(3)
    ]
    assert list((ours / "staging").iterdir()) == []
    assert json.loads((ours / "SUCCESS.json").read_text())["rows"] == 12


@pytest.mark.parametrize("sink", [FakeSink(), TwoFileSink()], ids=["one file", "two files"])
def test_killed_at_every_step_every_row_is_there_once(tmp_path: Path, sink: FakeSink) -> None:
    step = 0
    while run_and_die(tmp_path / str(step), sink, step):
        root = tmp_path / str(step)
        done = {p.name: p.read_bytes() for p in (root / "__batchsd/ledger/0001").glob("[0-9]*.json")}
        run_with(LocalStore(root), sink)
        check_whole(root)
        for name, marker in done.items():
            assert (root / "__batchsd/ledger/0001" / name).read_bytes() == marker, "a marker was changed"
        step += 1
    assert step > 3 * 2 * 5, "fewer steps than the protocol has"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.integers(4, 40), min_size=2, max_size=6))
@example(steps=[19, 23, 17, 11, 11])
def test_killed_again_and_again(tmp_path_factory: pytest.TempPathFactory, steps: list[int]) -> None:
    root = tmp_path_factory.mktemp("again") / "run"
    for step in steps:
        run_and_die(root, TwoFileSink(), step)
    run_with(LocalStore(root), TwoFileSink())
    # One death makes suspects; three more that happen to come while the same one is drawn alone condemn it.
    check_whole(root, condemned=(len(steps) - 1) // 3)


def test_a_second_start_draws_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run_all(store, SHARDS)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "status.json"}

    def refuse(sources: Any) -> Any:
        raise AssertionError("something was drawn again")

    run_all(store, SHARDS, refuse)
    assert {p: p.read_bytes() for p in before} == before


def test_another_plan_is_refused_with_what_differs(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run_all(store, SHARDS)
    other = plan_of(SHARDS, **{"sampler.steps": 30, "plugin ./tint.py": "abcd"})
    with pytest.raises(UsageError) as refused:
        run_all(store, SHARDS, plan=other)
    assert "sampler.steps: 20 -> 30" in str(refused.value)
    assert "plugin ./tint.py: absent -> abcd" in str(refused.value)
    file = {**other.files[0], "sha256": "ff"}
    with pytest.raises(
        UsageError, match=r"input file prompts.parquet: 12 rows, sha256 00 -> 12 rows, sha256 ff"
    ):
        Ledger(store).check(replace(plan_of(SHARDS), files=(file,)))


def test_soft_facts_and_the_job_itself_may_change(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path))
    plan = ledger.begin(plan_of(SHARDS))
    ledger.begin(replace(plan, soft={"torch": "9"}, job={"run": {"max_failed": 5}}))
    assert ledger.plan() == plan


def test_a_foreign_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis.tex"):
        run_all(LocalStore(tmp_path), SHARDS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_without_a_marker_is_not_done(tmp_path: Path) -> None:
    run_all(LocalStore(tmp_path), SHARDS)
    (tmp_path / "__batchsd/ledger/0001/00001.json").unlink()
    (tmp_path / "data/train-00001-of-00003.parquet").write_bytes(b"half a shard")
    run_all(LocalStore(tmp_path), SHARDS)
    assert published(tmp_path) == expected(SHARDS)


def test_a_published_file_that_is_gone_is_said(tmp_path: Path) -> None:
    run_all(LocalStore(tmp_path), SHARDS)
    (tmp_path / "data/train-00001-of-00003.parquet").unlink()
    with pytest.raises(UsageError, match=r"train-00001-of-00003.parquet was complete, .*00001.json"):
        run_all(LocalStore(tmp_path), SHARDS)


# -- two drivers, late workers -------------------------------------------------------------------------------


def worker_on_shard_1(store: LocalStore, nonce: str) -> Iterator[Event]:
    tickets = [Ticket(SHARDS[1], nonce)]

    def take(wait: bool) -> Ticket:
        if not tickets:
            raise Drained
        return tickets.pop()

    return work(workbench(store), take, lambda progress: None)


def staged(store: LocalStore, nonce: str) -> ShardResult:
    """What a worker hands in for shard 1."""
    *_, result = worker_on_shard_1(store, nonce)
    assert isinstance(result, ShardResult)
    return result


@contextmanager
def data_unchanged(root: Path) -> Iterator[None]:
    files = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (root / "data").iterdir()}
    markers = {p: p.read_bytes() for p in (root / "__batchsd/ledger/0001").iterdir()}
    yield
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (root / "data").iterdir()} == files
    assert {p: p.read_bytes() for p in (root / "__batchsd/ledger/0001").iterdir()} == markers
    assert list((root / "__batchsd/staging").iterdir()) == []


def test_a_driver_that_is_late_with_its_marker_changes_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    late = Ledger(store)
    plan = late.begin(plan_of(SHARDS))
    result = staged(store, "late")
    run_all(store, SHARDS)
    with data_unchanged(tmp_path):
        assert late.commit(result, 1, plan).nonce != "late"
    assert published(tmp_path) == expected(SHARDS)


def test_a_driver_that_stops_after_its_marker_is_finished_by_another(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def stop_here(step: str, name: str, before: bool) -> None:
        if step == "publish":
            raise InterruptedError

    late = Ledger(StepStore(tmp_path, stop_here))
    plan = late.begin(plan_of(SHARDS))
    result = staged(store, "late")
    with pytest.raises(InterruptedError):
        late.commit(result, 1, plan)
    assert list(tmp_path.glob("data/*")) == []

    def draw_the_others(sources: Any) -> Any:
        for shard, record in lanes(sources):
            assert shard.index != 1, "a committed shard was drawn again"
            yield shard, record

    run_all(store, SHARDS, draw_the_others)
    assert published(tmp_path) == expected(SHARDS)
    with data_unchanged(tmp_path):
        assert Ledger(store).commit(result, 1, plan).nonce == "late"


def revised(store: LocalStore, nonce: str, *names: str) -> ShardResult:
    """Shard 1 as built anew, with those files."""
    for name in names:
        store.put(f"{staging_folder(SHARDS[1], nonce)}/{name}", f"{name} {nonce}".encode())
    files = tuple(OutputFile(name, len(f"{name} {nonce}"), "") for name in names)
    return ShardResult(SHARDS[1], nonce, 4, 4, {}, files, {}, {})


def test_a_late_driver_leaves_the_files_of_a_later_revision(tmp_path: Path) -> None:
    """Stopped between its publish and the removal of what the shard has no more, while another one makes that anew."""
    store = LocalStore(tmp_path)
    ledger = Ledger(store)
    plan = ledger.begin(plan_of(SHARDS))
    ledger.commit(revised(store, "zero", "a.parquet", "failed/a.parquet"), 1, plan)

    def meanwhile(step: str, name: str, before: bool) -> None:
        if step == "publish" and not before:
            other = Ledger(store)
            other.roll_forward()
            assert not (tmp_path / "failed/a.parquet").exists()
            other.commit(revised(store, "two", "a.parquet", "failed/a.parquet"), 1, plan, revision=2)

    late = Ledger(StepStore(tmp_path, meanwhile))
    late.commit(revised(store, "one", "a.parquet"), 1, plan, revision=1)
    assert (tmp_path / "failed/a.parquet").read_text() == "failed/a.parquet two"
    assert (tmp_path / "data/a.parquet").read_text() == "a.parquet two"
    assert ledger.roll_forward().ok == 4


def test_a_worker_that_hands_in_after_the_end_changes_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    Ledger(store).begin(plan_of(SHARDS))
    late = worker_on_shard_1(store, "late")
    next(late)
    run_all(store, SHARDS)
    with data_unchanged(tmp_path):
        with pytest.raises(InfrastructureError, match=r"00001\.late"):
            list(late)


def test_attempts_are_counted_across_drivers(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    Ledger(store).begin(plan_of(SHARDS))
    next(worker_on_shard_1(store, "one"))
    next(worker_on_shard_1(store, "two"))
    run_all(store, SHARDS)
    assert [marker.attempt for marker in Ledger(store).markers()] == [1, 3, 1]


def test_finish_needs_every_shard(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run_all(store, SHARDS)
    (tmp_path / "__batchsd/SUCCESS.json").unlink()
    (tmp_path / "__batchsd/ledger/0001/00002.json").unlink()
    with pytest.raises(InfrastructureError, match=r"8 of 12 rows, 2 of 3 shards \(missing: \[2\]\)"):
        Ledger(store).finish(plan_of(SHARDS))
    assert not (tmp_path / "__batchsd/SUCCESS.json").exists()
