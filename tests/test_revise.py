"""Editing k rows redraws k rows; a kill at any step of it changes nothing of that."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from null_model import job_at, rows_of, run_job, write_manifest
from test_ledger import StepStore

from batchsd.job import Job
from batchsd.ledger import Ledger
from batchsd.revise import begin_retry, begin_update
from batchsd.store import LocalStore
from batchsd.types import UsageError

PROMPTS: list[str | None] = [f"prompt {i}" for i in range(12)]


LAYOUTS = {
    "parquet": (),
    "parquet aside": ("output.failed=aside",),
    "webdataset": ("output.sink=webdataset",),
    "folder": ("output.sink=folder",),
}


@pytest.fixture(params=LAYOUTS)
def job(request: pytest.FixtureRequest, tmp_path: Path, checkpoint: Path) -> Job:
    write_manifest(tmp_path / "prompts.parquet", PROMPTS, mood=["calm"] * 12)
    return job_at(tmp_path, checkpoint, *LAYOUTS[request.param])


def edit(job: Job, changes: dict[int, str | None], mood: dict[int, str] | None = None) -> None:
    prompts = [changes.get(i, prompt) for i, prompt in enumerate(PROMPTS)]
    moods = [(mood or {}).get(i, "calm") for i in range(12)]
    write_manifest(Path(job.input.manifest), prompts, mood=moods)


def drawn(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def data(job: Job) -> dict[str, bytes]:
    root = Path(job.output.uri)
    files = [path for top in ("data", "failed") for path in (root / top).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(files)}


def check_fresh(job: Job, log: Path) -> None:
    """The output holds what a run into an empty folder would hold."""
    fresh = job.model_copy(update={"output": job.output.model_copy(update={"uri": f"{job.output.uri}-fresh"})})
    run_job(fresh, log)
    assert rows_of(job) == rows_of(fresh)
    ours = Path(job.output.uri) / "__batchsd"
    assert list((ours / "staging").iterdir()) == []
    assert Ledger(LocalStore(Path(job.output.uri))).succeeded()


def test_only_edited_rows_are_drawn_and_only_their_shards_written(job: Job, tmp_path: Path) -> None:
    run_job(job, tmp_path / "first")
    before = data(job)
    edit(job, {1: "another", 9: "and this"})
    with pytest.raises(UsageError, match=r"--update takes up rows"):
        run_job(job, tmp_path / "refused")
    run_job(job, tmp_path / "second", begin_update)
    assert drawn(tmp_path / "second") == ["id9", "id1"] or drawn(tmp_path / "second") == ["id1", "id9"]
    after = data(job)
    touched = {name for name in before if before[name] != after[name]}
    assert not any("train-00001" in name for name in touched) and len({name[5:16] for name in touched}) == 2
    check_fresh(job, tmp_path / "fresh")
    again = data(job)
    run_job(job, tmp_path / "third")
    assert data(job) == again and not drawn(tmp_path / "third")


def test_other_columns_are_renewed_without_drawing(job: Job, tmp_path: Path) -> None:
    run_job(job, tmp_path / "first")
    edit(job, {}, mood={5: "wild"})
    run_job(job, tmp_path / "second", begin_update)
    assert not drawn(tmp_path / "second")
    assert [row["mood"] for row in rows_of(job)].index("wild") == 5
    check_fresh(job, tmp_path / "fresh")


def test_rows_may_turn_bad_and_good_and_back(job: Job, tmp_path: Path) -> None:
    edit(job, {2: None})
    run_job(job, tmp_path / "first")
    assert rows_of(job)[2]["status"] == "bad_input"
    edit(job, {7: None})
    run_job(job, tmp_path / "second", begin_update)
    assert drawn(tmp_path / "second") == ["id2"]
    check_fresh(job, tmp_path / "fresh")
    edit(job, {2: None})
    run_job(job, tmp_path / "third", begin_update)
    assert drawn(tmp_path / "third") == ["id7"]
    assert [row["status"] for row in rows_of(job)].index("bad_input") == 2


def test_an_edit_of_an_unfinished_run(job: Job, tmp_path: Path) -> None:
    assert die_at(job, tmp_path / "first", 25)
    done = Ledger(LocalStore(Path(job.output.uri))).tally().done
    assert 0 < len(done) < 3
    edit(job, {0: "new", 11: "newer"})
    run_job(job, tmp_path / "second", begin_update)
    assert {"id0", "id11"} <= set(drawn(tmp_path / "second"))
    check_fresh(job, tmp_path / "fresh")


@pytest.mark.parametrize("column", ["id", "prompt"])
def test_moved_rows_are_refused_and_nothing_is_touched(job: Job, tmp_path: Path, column: str) -> None:
    def rows(order: list[int]) -> None:
        ids = {"id": [f"id{i}" for i in order]} if column == "id" else {"id": [None] * 12}
        write_manifest(Path(job.input.manifest), [PROMPTS[i] for i in order], mood=["calm"] * 12, **ids)  # type: ignore

    rows(list(range(12)))
    run_job(job, tmp_path / "first")
    before = data(job)
    rows([11, *range(11)])
    with pytest.raises(UsageError, match="rows have moved"):
        run_job(job, tmp_path / "second", begin_update)
    assert data(job) == before and len(Ledger(LocalStore(Path(job.output.uri))).plans()) == 1


def test_other_changes_are_refused(job: Job, tmp_path: Path) -> None:
    run_job(job, tmp_path / "first")
    more = job.model_copy(update={"sampler": job.sampler.model_copy(update={"steps": 7})})
    with pytest.raises(UsageError, match=r"edited rows only.*\n.*sampler.steps: 20 -> 7"):
        run_job(more, tmp_path / "second", begin_update)
    write_manifest(Path(job.input.manifest), PROMPTS[:-1], mood=["calm"] * 11)
    with pytest.raises(UsageError, match="12 rows when this run began, now 11"):
        run_job(job, tmp_path / "second", begin_update)


def test_retry_draws_what_failed(job: Job, tmp_path: Path) -> None:
    run_job(job, tmp_path / "first", failing=("id3", "id6"))
    before = data(job)
    run_job(job, tmp_path / "second", begin_retry, failing=("id6",))
    assert sorted(drawn(tmp_path / "second")) == ["id3", "id6"]
    assert [row["status"] for row in rows_of(job)].count("oom") == 1
    run_job(job, tmp_path / "third", begin_retry)
    assert drawn(tmp_path / "third") == ["id6"]
    check_fresh(job, tmp_path / "fresh")
    third = [name for name in before if "train-00002" in name]
    assert third and [data(job)[name] for name in third] == [before[name] for name in third]
    markers = sorted(path.name for path in (Path(job.output.uri) / "__batchsd/ledger/0001").iterdir())
    assert markers == ["00000.json", "00000.r1.json", "00001.json", "00001.r1.json", "00001.r2.json", "00002.json"]


def die_at(job: Job, log: Path, step: int, begin: Any = None) -> bool:
    """A run in a process of its own, which ends at that step; False where it came to its end before."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(name: str, argument: str, before: bool) -> None:
            nonlocal count
            count += 1
            if count > step:
                os._exit(9)

        try:
            run_job(job, log, *([begin] if begin else []), store=StepStore(Path(job.output.uri), die))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_late_driver_changes_nothing(job: Job, tmp_path: Path) -> None:
    """It drew a shard, was stopped before its marker, and goes on after others committed and revised it."""
    from null_model import bench, draw

    from batchsd.bench import Drained, Ticket
    from batchsd.prepare import prepare
    from batchsd.run import work
    from batchsd.types import ShardResult

    (prepared,) = prepare(job, 1, False)
    prepared.ledger.begin(prepared.plan)
    tickets = [Ticket(prepared.shards[0], "late")]

    def take(wait: bool) -> Ticket:
        if not tickets:
            raise Drained
        return tickets.pop()

    workbench = bench(prepared.recipe, prepared.ledger.store, lambda request: draw(tmp_path / "late", (), request))
    (late,) = [event for event in work(workbench, take, lambda event: None) if isinstance(event, ShardResult)]
    late = replace(late, facts={"who": "late"})
    run_job(job, tmp_path / "first", failing=("id1",))
    run_job(job, tmp_path / "second", begin_retry)
    before = data(job)
    marker = prepared.ledger.commit(late, 9, prepared.plan)
    assert (marker.revision, marker.facts) == (1, {})
    assert data(job) == before
