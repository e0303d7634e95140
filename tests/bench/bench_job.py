"""How fast everything around the network is: planning, reading, writing, committing, starting again. No model runs.

    python tests/bench/bench_job.py [--planned 10000000] [--rows 1000000] [--markers 99999] [--only plan start ...]

A manifest of `planned` rows is written once and planned from its footers. Then the first `rows` of it are run in
shards of 1,000, with every fsync, by a worker in this process: once with a PNG of 64 x 64 encoded for each row, once
with bytes that were encoded before; and a tenth of them, for the growth of memory. Last, a run with `markers` shards
of one row each is begun again. Each measurement is a process of its own; `peak` is its largest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchsd import plugins
from batchsd.bench import Source, Workbench
from batchsd.drive import drive
from batchsd.encode import encoder
from batchsd.executor import InProcess
from batchsd.job import Job, load
from batchsd.ledger import Ledger
from batchsd.marker import Marker
from batchsd.prepare import Prepared, prepare
from batchsd.recipe import sink_of
from batchsd.revise import begin_run, limited
from batchsd.status import read_status
from batchsd.stop import Stop
from batchsd.types import OutputFile, Record, Request, Shard

GROUP = 100_000  # manifest rows a row group
SIDE = 64
LIGHTS = ("red", "green", "blue", "gold")


def write_manifest(folder: Path, rows: int) -> None:
    """Ids and prompts, all different, as a manifest of captions has them."""
    path = folder / f"prompts-{rows}.parquet"
    if path.exists():
        return
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("source", pa.string())])
    with pq.ParquetWriter(path.with_suffix(".partial"), schema) as writer:
        for first in range(0, rows, GROUP):
            numbers = range(first, min(rows, first + GROUP))
            prompts = [f"a photograph of scene {i}, {LIGHTS[i % 4]} light, 35 mm" for i in numbers]
            columns = [[f"row-{i:09d}" for i in numbers], prompts, ["web"] * len(numbers)]
            writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema))
    path.with_suffix(".partial").rename(path)


def job_of(folder: Path, rows: int, uri: str, rows_per_shard: int = 1000) -> Job:
    (folder / "job.toml").write_text(
        f'[input]\nmanifest = "prompts-{rows}.parquet"\n[model]\npath = "tiny-scenes"\ndevice = "cpu"\n'
        f'[sampler]\nheight = {SIDE}\nwidth = {SIDE}\n[output]\nuri = "{uri}"\nrows_per_shard = {rows_per_shard}\n'
    )
    return load(folder / "job.toml", (), {})


def null_engine(sources: Iterable[Source | None], draw: Callable[[Request], Record]) -> Iterator[tuple[Shard, Record]]:
    """Rows come out in the order in which they went in."""
    for source in sources:
        if source is not None:
            for request in source[1]:
                yield source[0], draw(request)


def drawer(encoded: bool) -> Callable[[Request], Record]:
    """Noise about a colour, which packs as badly as a photograph; encoded anew for each row, or once for all."""
    encode = encoder({"format": "png"})
    noise_HWC = np.random.default_rng(0).integers(0, 64, (SIDE, SIDE, 3), dtype=np.uint8)
    same, _ = encode(noise_HWC)

    def draw(request: Request) -> Record:
        data = same
        if not encoded:
            data, _ = encode(noise_HWC + np.uint8(request.seed % 192))
        return Record(request, "ok", image=data, height=SIDE, width=SIDE)

    return draw


def bench_of(prepared: Prepared, encoded: bool) -> Workbench:
    recipe, registry = prepared.recipe, plugins.build((), Path())
    generate = partial(null_engine, draw=drawer(encoded))
    sink, read = sink_of(recipe.job, registry), recipe.reader(registry).read
    return Workbench(generate, read, recipe.job.input.repeat, sink, recipe.schema, prepared.ledger.store)


def plan(folder: Path, planned: int) -> dict[str, Any]:
    began = time.monotonic()
    (prepared,) = prepare(job_of(folder, planned, "planned"), 1, False)
    return {"rows": planned, "shards": prepared.plan.shards, "seconds": time.monotonic() - began}


def run(folder: Path, planned: int, rows: int, encoded: bool) -> dict[str, Any]:
    """The first `rows` of the manifest, from the plan to SUCCESS."""
    job = limited(job_of(folder, planned, f"run-{'pre-encoded' if encoded else 'encoding'}-{rows}"), rows)
    subprocess.run(["rm", "-rf", job.output.uri], check=True)
    (prepared,) = prepare(job, 1, False, rows)
    (beginning,) = begin_run([prepared])
    executor = InProcess(partial(bench_of, prepared, encoded))
    began, cpu = time.monotonic(), time.process_time()
    watch = (lambda snapshot: None, lambda text: None)
    total = drive(
        prepared.ledger, prepared.plan, beginning.tally, prepared.shards, executor, Stop(5), prepared.max_failed, *watch
    )
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    assert (total.rows, total.ok) == (rows, rows)
    subprocess.run(["rm", "-rf", job.output.uri], check=True)
    return {"rows": rows, "seconds": seconds, "rows a second": rows / seconds, "rows a CPU second": rows / cpu}


def start(folder: Path, markers: int) -> dict[str, Any]:
    """Begin a run again whose markers and (empty) files are all there but one."""
    write_manifest(folder, markers)
    job = job_of(folder, markers, "markers", 1)
    subprocess.run(["rm", "-rf", job.output.uri], check=True)
    (prepared,) = prepare(job, 1, False)
    prepared.ledger.begin(prepared.plan)
    write_markers(Path(job.output.uri), prepared)
    began = time.monotonic()
    parts = prepare(job, 1, False)
    planned = time.monotonic() - began
    (beginning,) = begin_run(parts)
    begun = time.monotonic() - began - planned
    assert len(beginning.tally.done) == markers - 1
    began = time.monotonic()
    assert read_status(job.output.uri)["done"] == markers - 1
    looked = time.monotonic() - began
    subprocess.run(["rm", "-rf", job.output.uri], check=True)
    return {"markers": markers - 1, "plan": planned, "roll forward": begun, "status": looked}


def write_markers(root: Path, prepared: Prepared) -> None:
    folder = root / Ledger(prepared.ledger.store).folder
    folder.mkdir(parents=True)
    (root / "data").mkdir()
    facts = {"batchsd": "0", "torch": "2.13.0", "device": "cpu"}
    timings = {"started": 0.0, "seconds": 1.0}
    marker = Marker(0, 1, 1, {}, 0, "0" * 64, (), "0" * 16, 1, prepared.plan.hash, facts, timings)
    for shard in prepared.shards[:-1]:
        files = (OutputFile(f"{shard.name}.parquet", 0, "0" * 64),)
        text = json.dumps(asdict(replace(marker, shard=shard.index, files=files)), indent=1)
        (folder / f"{shard.index:05d}.json").write_text(text)
        (root / "data" / f"{shard.name}.parquet").touch()


def alone(measure: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    """Measure in a process of its own; print its figures and its peak memory."""
    child = os.fork()
    if child == 0:
        found = measure(*arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures = [f"{name} {value:,.1f}" if value % 1 else f"{name} {value:,}" for name, value in found.items()]
        print(f"{measure.__name__:6}", ", ".join([*figures, f"peak {peak:,.0f} MiB"]), flush=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"{measure.__name__} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planned", type=int, default=10_000_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--markers", type=int, default=99_999)
    parser.add_argument("--only", choices=("plan", "pre-encoded", "encoding", "start"), nargs="*", default=())
    parser.add_argument("--folder", type=Path, default=Path("out/bench_job"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_manifest(options.folder, options.planned)
    steps = {
        "plan": [(plan, options.planned)],
        "pre-encoded": [(run, options.planned, rows, True) for rows in (options.rows // 10, options.rows)],
        "start": [(start, options.markers)],
        "encoding": [(run, options.planned, rows, False) for rows in (options.rows // 10, options.rows)],
    }
    for name, measurements in steps.items():
        for measure, *arguments in measurements if name in (options.only or steps) else ():
            alone(measure, options.folder, *arguments)


if __name__ == "__main__":
    main()
