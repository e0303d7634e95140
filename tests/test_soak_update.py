"""Editing 100 rows of a million redraws 100 pictures, with a SIGKILL at each step of the revision.

The quick version has some thousand rows; `pytest -m soak tests/test_soak_update.py -s` is the whole thing.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from null_model import job_at
from test_ledger import STEPS, StepStore

from batchsd import plugins
from batchsd.bench import Workbench
from batchsd.drive import drive
from batchsd.executor import InProcess
from batchsd.ledger import Ledger
from batchsd.prepare import Prepared, prepare
from batchsd.recipe import sink_of
from batchsd.revise import begin_run, begin_update
from batchsd.stop import Stop
from batchsd.store import LocalStore
from batchsd.types import Record, Request


def write(path: Path, rows: int, edited: frozenset[int]) -> None:
    prompts = [f"prompt {i}{' anew' if i in edited else ''}" for i in range(rows)]
    pq.write_table(pa.table({"id": [f"id{i}" for i in range(rows)], "prompt": prompts}), path, row_group_size=100_000)


def bench_of(part: Prepared, log: Path | None) -> Workbench:
    """A worker whose pictures say what was asked; it logs each row that it draws."""
    recipe, registry = part.recipe, plugins.build((), Path())

    def draw(request: Request) -> Record:
        if log is not None:
            with log.open("a") as file:
                file.write(f"{request.key}\n")
        return Record(request, "ok", image=request.row_hash.encode(), height=16, width=16)

    def generate(sources: Any) -> Any:
        for source in sources:
            if source is not None:
                yield from ((source[0], draw(request)) for request in source[1])

    sink = sink_of(recipe.job, registry)
    return Workbench(generate, recipe.reader(registry).read, 1, sink, recipe.schema, part.ledger.store)


def run(job: Any, begin: Any, log: Path | None, store: LocalStore) -> None:
    (part,) = prepare(job, 1, False)
    part = Prepared(part.plan, part.shards, Ledger(store), *(getattr(part, name) for name in REST))
    (beginning,) = begin([part])
    if beginning.complete:
        part.ledger.finish(part.plan)
        return
    limits = (Stop(5), 0, lambda snapshot: None, lambda text: None)
    executor = InProcess(partial(bench_of, part, log))
    drive(part.ledger, part.plan, beginning.tally, part.shards, executor, *limits, revisions=beginning.revisions)


REST = ("recipe", "warnings", "recognised", "registry")


def killed(job: Any, log: Path, step: str, at: int) -> bool:
    """`run --update` in a process that gets SIGKILL at the `at`-th operation of that kind; False if it ended first."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(name: str, argument: str, before: bool) -> None:
            nonlocal count
            count += name == step and before
            if count > at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            run(job, begin_update, log, StepStore(Path(job.output.uri), die))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    "rows, edits, rows_per_shard", [(3000, 12, 100), pytest.param(1_000_000, 100, 1000, marks=pytest.mark.soak)]
)
def test_edits_redraw_edits(tmp_path: Path, checkpoint: Path, rows: int, edits: int, rows_per_shard: int) -> None:
    manifest, log = tmp_path / "prompts.parquet", tmp_path / "drawn"
    write(manifest, rows, frozenset())
    job = job_at(tmp_path, checkpoint, f"output.rows_per_shard={rows_per_shard}", "output.embed=[]")
    run(job, begin_run, None, LocalStore(Path(job.output.uri)))
    data = Path(job.output.uri) / "data"
    before = {path.name: path.stat().st_ino for path in data.iterdir()}
    edited = frozenset((i * rows) // edits + 7 * i % rows_per_shard for i in range(edits))
    write(manifest, rows, edited)
    kills = [step for i, step in enumerate(STEPS) if killed(job, log, step, i % 3)]
    run(job, begin_update, log, LocalStore(Path(job.output.uri)))
    rewritten = sum(path.stat().st_ino != before[path.name] for path in data.iterdir())
    keys = log.read_text().split()
    print(f"{rows:,} rows, killed at {kills}: {rewritten} shards rewritten, {len(set(keys))} rows redrawn, "
          f"{len(keys) - len(set(keys))} of them again after a kill")  # fmt: skip
    assert len(kills) >= 5 and rewritten <= edits
    assert set(keys) == {f"id{i}" for i in edited}
    seen = 0
    for path in sorted(data.iterdir()):
        table = pq.ParquetFile(path).read(["id", "prompt", "image", "row_hash"]).to_pylist()
        for row in table:
            assert row["id"] == f"id{seen}" and row["prompt"].endswith("anew") == (seen in edited)
            assert row["image"]["bytes"].decode() == row["row_hash"]
            seen += 1
    assert seen == rows
