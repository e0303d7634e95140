"""A whole run but for the network: real manifest, reader, ledger and sinks; pictures are one small PNG a row.

`draw` writes every key that it draws into a file: what was drawn twice shows there.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from fakes import lanes
from PIL import Image

from batchsd import plugins
from batchsd.bench import Workbench
from batchsd.drive import drive
from batchsd.executor import InProcess
from batchsd.job import Job, load
from batchsd.ledger import Ledger
from batchsd.marker import Tally, sum_of
from batchsd.prepare import Prepared, prepare
from batchsd.recipe import Recipe, sink_of
from batchsd.revise import Beginning, begin_run
from batchsd.stop import Stop
from batchsd.store import LocalStore, Store
from batchsd.types import Record, Request


def write_manifest(path: Path, prompts: list[str | None], **columns: list[object]) -> None:
    table = {"id": [f"id{i}" for i in range(len(prompts))], "prompt": prompts, **columns}
    pq.write_table(pa.table(table), path)


def job_at(folder: Path, checkpoint: Path, *sets: str) -> Job:
    (folder / "job.toml").write_text(
        f'[input]\nmanifest = "prompts.parquet"\n[model]\npath = "{checkpoint}"\ndevice = "cpu"\n'
        '[sampler]\nheight = 16\nwidth = 16\n[output]\nuri = "run"\nrows_per_shard = 4\n[run]\nmax_failed = 1.0\n'
    )
    return load(folder / "job.toml", sets, {})


def picture_of(request: Request) -> bytes:
    """A PNG whose one colour is the row's hash."""
    color = tuple(bytes.fromhex(request.row_hash)[:3])
    data = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(data, "png")
    return data.getvalue()


def draw(log: Path, failing: tuple[str, ...], request: Request) -> Record:
    if request.error:
        return Record(request, request.error.status, str(request.error))
    with log.open("a") as file:
        file.write(f"{request.key}\n")
    if request.key in failing:
        return Record(request, "oom", "no room")
    return Record(request, "ok", image=picture_of(request), height=16, width=16)


def bench(recipe: Recipe, store: Store, draw: Callable[[Request], Record]) -> Workbench:
    """What a Recipe builds, without a model."""
    registry = plugins.build(recipe.plugins, Path())
    job = recipe.job
    generate = partial(lanes, record=draw)
    sink = sink_of(job, registry)
    return Workbench(generate, recipe.reader(registry).read, job.input.repeat, sink, recipe.schema, store)


def run_job(
    job: Job,
    log: Path,
    begin: Callable[[Sequence[Prepared]], list[Beginning]] = begin_run,
    failing: tuple[str, ...] = (),
    store: Store | None = None,
    check_lock: Callable[[], None] = lambda: None,
    record: Callable[[Request], Record] | None = None,
) -> Tally:
    """What `batchsd run` does, from the plan on. `record` draws instead of `draw`."""
    store = store or LocalStore(Path(job.output.uri))
    begun = begin([replace(part, ledger=Ledger(store, part.plan.number)) for part in prepare(job, 1, False)])
    totals = []
    for beginning in begun:
        part, tally, revisions = beginning.prepared, beginning.tally, beginning.revisions
        if beginning.complete:
            totals.append(part.ledger.finish(part.plan))
            continue
        executor = InProcess(partial(bench, part.recipe, store, record or partial(draw, log, failing)))
        limits = (Stop(5), part.max_failed, lambda snapshot: None, lambda text: None, check_lock)
        totals.append(drive(part.ledger, part.plan, tally, part.shards, executor, *limits, revisions=revisions))
    return sum_of(totals)


def rows_of(job: Job) -> list[dict[str, object]]:
    """Every output row in order, as readers of its layout find it: the picture is `image`, null where it failed."""
    data = Path(job.output.uri) / "data"
    read = {"parquet": rows_of_parquet, "webdataset": rows_of_tar, "folder": rows_of_folder}[job.output.sink]
    rows = [row for path in sorted(data.iterdir()) for row in read(path)] if data.exists() else []
    failed = sorted((data.parent / "failed").glob("*.parquet"))
    rows += [row for path in failed for row in rows_of_parquet(path)]
    return rows if not failed else sorted(rows, key=lambda row: int(str(row["id"])[2:]))


def rows_of_parquet(path: Path) -> list[dict[str, object]]:
    return [{**row, "image": row["image"] and row["image"]["bytes"]} for row in pq.ParquetFile(path).read().to_pylist()]


def rows_of_tar(path: Path) -> list[dict[str, object]]:
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    rows = {name[:-5]: json.loads(data) for name, data in members.items() if name.endswith(".json")}
    assert [row["prompt"] for row in rows.values()] == [members[f"{key}.txt"].decode() for key in rows]
    return [{**row, "image": members[f"{key}.png"]} for key, row in rows.items()]


def rows_of_folder(path: Path) -> list[dict[str, object]]:
    rows = pq.ParquetFile(path / "metadata.parquet").read().to_pylist()
    return [{**row, "image": (path / row.pop("file_name")).read_bytes()} for row in rows]
