"""A manifest that grows: what is drawn stays, what is new becomes a plan of its own, whatever dies on the way."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from null_model import job_at, rows_of, run_job, write_manifest
from test_ledger import StepStore

from batchsd.job import Job
from batchsd.ledger import Ledger, ledgers, numbers
from batchsd.reread import records, shards
from batchsd.revise import begin_retry, begin_run, begin_update, job_of_run
from batchsd.status import read_status
from batchsd.store import LocalStore
from batchsd.types import UsageError
from batchsd.verify import verify


def write(folder: Path, name: str, rows: range | list[int], edited: tuple[int, ...] = (), **columns: Any) -> None:
    prompts = [f"prompt {i}{' edited' if i in edited else ''}" for i in rows]
    table = {"id": [f"id{i}" for i in rows], "prompt": prompts, **columns}
    pq.write_table(pa.table(table), folder / "prompts" / name)


@pytest.fixture
def job(tmp_path: Path, checkpoint: Path) -> Job:
    """Two files of 6 and 3 rows, shards of 4."""
    (tmp_path / "prompts").mkdir()
    write(tmp_path, "b.parquet", range(6))
    write(tmp_path, "d.parquet", range(6, 9))
    return job_at(tmp_path, checkpoint, f"input.manifest={tmp_path}/prompts")


def drawn(log: Path) -> set[str]:
    keys = log.read_text().split() if log.exists() else []
    assert len(keys) == len(set(keys)), "a row was drawn twice"
    return set(keys)


def drawn_after_a_death(log: Path) -> set[str]:
    """Such a run first draws alone the rows that were in flight: these twice."""
    return set(log.read_text().split()) if log.exists() else set()


def ids(*rows: int) -> set[str]:
    return {f"id{i}" for i in rows}


def files(job: Job) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((Path(job.output.uri) / "data").iterdir())}


def check(job: Job, rows: int) -> None:
    """Every row once, in the order of its key, as `verify`, `status` and a reader of the folder see it."""
    faults: list[str] = []
    verdict = verify(job.output.uri, faults.append, lambda so_far: None)
    assert (faults, verdict.missing, verdict.rows) == ([], 0, rows)
    found = read_status(job.output.uri)
    assert (found["rows"], found["done"], found["left"]) == (rows, rows, 0)
    assert {str(row["id"]) for row in rows_of(job)} == ids(*range(rows)) and len(rows_of(job)) == rows
    assert sorted(record.request.key for shard in shards(job.output.uri) for record in records(shard)) == sorted(
        ids(*range(rows))
    )
    store = LocalStore(Path(job.output.uri))
    assert all(ledger.succeeded() for ledger in ledgers(store))
    success = json.loads((Path(job.output.uri) / "__batchsd/SUCCESS.json").read_text())
    assert (success["rows"], len(success["plans"])) == (rows, len(numbers(store)))
    assert store.children("__batchsd/staging") == []


def test_new_files_become_plans_of_their_own(job: Job, tmp_path: Path) -> None:
    run_job(job, tmp_path / "first")
    before = files(job)
    run_job(job, tmp_path / "nothing new")
    assert files(job) == before and drawn(tmp_path / "nothing new") == set()
    write(tmp_path, "a.parquet", range(9, 14))  # before the others by name
    write(tmp_path, "empty.parquet", [])
    run_job(job, tmp_path / "second")
    assert drawn(tmp_path / "second") == ids(*range(9, 14))
    assert [name for name in files(job) if name not in before] == [
        "train-00000-of-00002-p0002.parquet",
        "train-00001-of-00002-p0002.parquet",
    ]
    assert {name: data for name, data in files(job).items() if name in before} == before
    write(tmp_path, "e.parquet", range(14, 15))
    run_job(job, tmp_path / "third")
    assert drawn(tmp_path / "third") == ids(14) and numbers(LocalStore(Path(job.output.uri))) == [1, 2, 3]
    check(job, 15)


def test_datasets_loads_all_plans(job: Job, tmp_path: Path) -> None:
    from datasets import load_dataset

    run_job(job, tmp_path / "first")
    write(tmp_path, "e.parquet", range(9, 20))
    run_job(job, tmp_path / "second")
    loaded = load_dataset(job.output.uri, cache_dir=str(tmp_path / "cache"))["train"]
    assert {row["id"] for row in loaded} == ids(*range(20)) and len(loaded) == 20


def test_a_changed_file_needs_update_and_its_new_rows_follow(job: Job, tmp_path: Path) -> None:
    run_job(job, tmp_path / "first")
    before = files(job)
    write(tmp_path, "d.parquet", range(6, 14), edited=(7,))
    write(tmp_path, "e.parquet", range(14, 16))
    with pytest.raises(UsageError, match=r"(?s)input file d.parquet: .*--update"):
        run_job(job, tmp_path / "refused")
    assert files(job) == before and numbers(LocalStore(Path(job.output.uri))) == [1]
    run_job(job, tmp_path / "second", begin_update)
    assert drawn(tmp_path / "second") == ids(7, *range(9, 16))
    changed = [name for name, data in before.items() if files(job)[name] != data]
    assert changed == ["train-00002-of-00003.parquet"]
    check(job, 16)
    assert {row["id"]: row["prompt"] for row in rows_of(job)}["id7"] == "prompt 7 edited"
    write(tmp_path, "d.parquet", range(6, 14), edited=(7, 12))  # a row of the second plan
    run_job(job, tmp_path / "third", begin_update)
    assert drawn(tmp_path / "third") == ids(12)
    check(job, 16)
    run_job(job, tmp_path / "again", begin_update)
    assert drawn(tmp_path / "again") == set()


def test_what_cannot_be_appended_is_refused_and_nothing_is_touched(job: Job, tmp_path: Path) -> None:
    run_job(job, tmp_path / "first")
    before = files(job)

    def refused(message: str, begin: Any = begin_run) -> None:
        with pytest.raises(UsageError, match=message):
            run_job(job, tmp_path / "refused", begin)
        assert files(job) == before and numbers(LocalStore(Path(job.output.uri))) == [1]
        assert len(Ledger(LocalStore(Path(job.output.uri))).plans()) == 1

    write(tmp_path, "e.parquet", range(9, 12), mood=["calm"] * 3)
    refused(r"new files \(e.parquet\) the output's column 'mood' is string; in the pictures .* absent.*--new")
    write(tmp_path, "e.parquet", range(9, 12), seed=["one"] * 3)
    refused(r"column 'seed' is string, but seed must be a number")
    (tmp_path / "prompts/e.parquet").unlink()
    write(tmp_path, "b.parquet", [9, *range(6)])
    refused("rows have moved", begin_update)
    write(tmp_path, "b.parquet", range(5))
    refused("b.parquet had 6 rows when this run began, now 5", begin_update)
    write(tmp_path, "b.parquet", range(6))
    run_job(job, tmp_path / "only touched")  # the same bytes, another mtime
    assert drawn(tmp_path / "only touched") == set()
    (tmp_path / "prompts/d.parquet").unlink()
    refused(r"the manifest's file d.parquet is gone")


def test_retry_leaves_new_files_for_the_next_run(job: Job, tmp_path: Path) -> None:
    run_job(job, tmp_path / "first", failing=("id3",))
    write(tmp_path, "e.parquet", range(9, 12))
    run_job(job, tmp_path / "second", failing=("id3", "id10"))
    write(tmp_path, "f.parquet", range(12, 14))
    again, limit = job_of_run(job.output.uri)
    assert limit is None
    run_job(again, tmp_path / "third", begin_retry)
    assert drawn(tmp_path / "third") == ids(3, 10)
    assert read_status(job.output.uri)["failed"] == {} and read_status(job.output.uri)["rows"] == 12
    run_job(job, tmp_path / "fourth")
    assert drawn(tmp_path / "fourth") == ids(12, 13)
    check(job, 14)


def test_an_interrupted_update_is_finished_by_retry_too(job: Job, tmp_path: Path) -> None:
    run_job(job, tmp_path / "first", failing=("id0",))
    write(tmp_path, "d.parquet", range(6, 9), edited=(8,))
    assert die_at(job, tmp_path / "second", 6, begin_update)
    assert drawn(tmp_path / "second") == set()
    run_job(job, tmp_path / "third", begin_retry)
    assert drawn(tmp_path / "third") == ids(0, 8)
    check(job, 9)


def die_at(job: Job, log: Path, step: int, begin: Any) -> bool:
    """A run in a process of its own, which ends at that storage operation; False where it has fewer."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(name: str, argument: str, before: bool) -> None:
            nonlocal count
            count += 1
            if count > step:
                os._exit(9)

        try:
            run_job(job, log, begin, store=StepStore(Path(job.output.uri), die))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("begin", [begin_run, begin_update])
def test_killed_at_every_step_of_an_append(job: Job, tmp_path: Path, begin: Any) -> None:
    """With `begin_update` an edit and appended rows come together with a new file."""
    run_job(job, tmp_path / "first")
    new = set(range(9, 14))
    write(tmp_path, "e.parquet", range(9, 13))
    write(tmp_path, "f.parquet", range(13, 14))
    if begin is begin_update:
        write(tmp_path, "d.parquet", [6, 7, 8, 14, 15], edited=(6,))
        new |= {6, 14, 15}
    before, step, died = tmp_path / "before", int(begin is begin_update), True
    shutil.copytree(job.output.uri, before)
    run_job(job, tmp_path / "whole", begin)
    whole = files(job)
    while died:
        shutil.rmtree(job.output.uri)
        shutil.copytree(before, job.output.uri)
        died = die_at(job, tmp_path / f"log{step}", step, begin)
        run_job(job, tmp_path / f"log{step} again", begin)
        assert files(job) == whole
        before_it, after_it = drawn(tmp_path / f"log{step}"), drawn_after_a_death(tmp_path / f"log{step} again")
        assert before_it | after_it == ids(*new)
        step += 4 if step > 20 else 2  # the other steps are killed in test_ledger.py and test_revise.py
    check(job, 9 + len(new - {6}))
    assert step > 20, "fewer steps than the protocol has"


def test_a_list_that_grows_is_a_manifest_that_grows(tmp_path: Path, checkpoint: Path) -> None:
    """Files of one name among them: rows, seeds and pictures that are there stay as they are."""

    def listing(*days: str) -> Job:
        paths = [str(tmp_path / day / "prompts.parquet") for day in days]
        return job_at(tmp_path, checkpoint, f"input.manifest={json.dumps(paths)}")

    for day in ("mon", "tue", "wed"):
        (tmp_path / day).mkdir()
        write_manifest(tmp_path / day / "prompts.parquet", [f"{day} {i}" for i in range(3)])
    job = listing("mon", "tue")
    run_job(job, tmp_path / "log")
    assert [row["prompt"] for row in rows_of(job)] == [f"{day} {i}" for day in ("mon", "tue") for i in range(3)]
    before = files(job)
    run_job(listing("mon", "tue", "wed"), tmp_path / "log")
    assert before.items() < files(job).items()
    assert {row["prompt"] for row in rows_of(job)} == {f"{day} {i}" for day in ("mon", "tue", "wed") for i in range(3)}
    after = files(job)
    with pytest.raises(UsageError, match="prompts.parquet"):
        run_job(listing("tue", "mon", "wed"), tmp_path / "log")
    assert files(job) == after
