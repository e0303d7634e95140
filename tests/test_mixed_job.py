"""Rows of all kinds as one job, by the whole path: manifest -> batchsd run -> Parquet. Each row is what it is alone.

`pytest` draws a few rows with a small network. The soak draws 256 with the shipped model: six samplers, 5 to 50 steps,
guidance on and off, three sizes; in two orders, batches of 1, 4 and 16, on one and on two workers, and after a worker
and then the driver were killed. It prints the figures of each run:

    pytest -m soak -s tests/test_mixed_job.py
"""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.bench_mixed import mixed_rows
from PIL import Image

from batchsd.job import Job, load
from batchsd.prepare import prepare
from batchsd.types import Request

Pictures = dict[str, bytes]


@dataclass(frozen=True)
class Mixed:
    """A job of mixed rows in a folder of its own."""

    folder: Path
    model: str
    rows: Sequence[Request]
    rows_per_shard: int

    def job(self, name: str, sets: Sequence[str], shuffled: bool = False) -> Job:
        """Every other row leaves its seed open: then its id decides, wherever in the manifest it stands."""
        rows = list(self.rows)
        if shuffled:
            random.Random(1).shuffle(rows)
        columns = ("prompt", "steps", "guidance_scale", "height", "width", "scheduler")
        table: dict[str, object] = {name: [getattr(row, name) for row in rows] for name in columns}
        table["id"] = [row.key for row in rows]
        table["seed"] = pa.array([row.seed if row.seed % 2 else None for row in rows], pa.int64())
        pq.write_table(pa.table(table), self.folder / f"{name}.parquet")
        file = self.folder / f"{name}.toml"
        file.write_text(
            f'[input]\nmanifest = "{name}.parquet"\n[model]\npath = "{self.model}"\ndevice = "cpu"\n'
            f'[output]\nuri = "{name}"\nrows_per_shard = {self.rows_per_shard}\nembed = []\n[run]\nseed = 5\n'
        )
        return load(file, sets, {})

    def run(self, name: str, sets: Sequence[str], *options: str, shuffled: bool = False) -> Pictures:
        """The command, to its end."""
        job = self.job(name, sets, shuffled)
        with started(self.folder, name, sets, *options) as process:
            output = process.communicate(timeout=3600)[0]
        assert process.returncode == 0, output[-3000:]
        return pictures_of(Path(job.output.uri))

    def alone(self, name: str, sets: Sequence[str], every: int = 1) -> Pictures:
        """Each row (or every so-manieth) by itself, by an engine that this job's recipe makes."""
        (prepared,) = prepare(self.job(name, sets), 1, False)
        bench = prepared.recipe("cpu", 1)
        found = {}
        requests = [(shard, request) for shard in prepared.shards for request in bench.read(shard)]
        for shard, request in requests[::every]:
            ((_, record),) = bench.generate([(shard, iter([request]))])
            assert record.status == "ok" and record.image is not None, record.error
            found[request.key] = record.image
        return found


def started(folder: Path, name: str, sets: Sequence[str], *options: str) -> subprocess.Popen[str]:
    given = [part for each in sets for part in ("--set", each)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "batchsd", "run", str(folder / f"{name}.toml"), *given, *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def pictures_of(run: Path) -> Pictures:
    rows = [row for file in sorted((run / "data").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert {row["status"] for row in rows} == {"ok"}
    found = {row["id"]: row["image"]["bytes"] for row in rows}
    assert len(found) == len(rows), "a row came twice"
    return found


def furthest(ours: Pictures, theirs: Pictures) -> int:
    """The largest difference of two pixels of one row, in 1/255."""
    assert len(set(theirs.values())) == len(theirs), "equal pictures would equal anything"
    return max(int(np.abs(pixels(ours[key]) - pixels(theirs[key])).max()) for key in theirs)


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture))).astype(int)


def check(ours: Pictures, alone: Pictures, keys: set[str], equal: bool, what: str) -> None:
    """Every row is there once, and is what it is alone."""
    assert ours.keys() == keys
    different = sum(ours[key] != picture for key, picture in alone.items())
    most = furthest(ours, alone)
    print(f"{what}: {len(alone)} rows compared, {different} differ in a byte, at most by {most}/255", flush=True)
    assert most <= 1 and not (equal and different)


FIXED = "run.deterministic=true"


# -- a few rows, with a small network


@pytest.fixture(scope="module")
def few(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed(tmp_path_factory.mktemp("few"), str(checkpoint), mixed_rows(10, 32, seed=3, most=8), 4)


@pytest.fixture
def as_before() -> Iterator[None]:
    """A deterministic engine tells torch so for the whole process."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_a_few_rows_are_what_they_are_alone(few: Mixed, as_before: None) -> None:
    keys = {row.key for row in few.rows}
    alone = few.alone("alone", ["run.batch_size=4", FIXED])
    check(few.run("together", ["run.batch_size=4", FIXED], "--local", shuffled=True), alone, keys, True, "fixed, 4")
    check(few.run("free", ["run.batch_size=16"], "--local"), alone, keys, False, "free, 16")


# -- the soak


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed(tmp_path_factory.mktemp("many"), "tiny-scenes", mixed_rows(256, 64), 32)


@pytest.fixture(scope="module", params=[False, True], ids=["free", "fixed"])
def sets(request: pytest.FixtureRequest) -> list[str]:
    return [FIXED] if request.param else []


@pytest.fixture(scope="module")
def alone(many: Mixed, sets: list[str]) -> Pictures:
    began = time.monotonic()
    found = many.alone(f"alone{len(sets)}", ["run.batch_size=4", *sets])
    print(f"\n{len(found)} rows alone, {sets}: {time.monotonic() - began:.0f} s", flush=True)
    return found


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "batch", "options", "shuffled"),
    [
        ("order", 4, ["--local"], True),
        ("killed", 4, ["--address", "local"], True),
        ("b16", 16, ["--local"], False),
        ("b1", 1, ["--local"], False),
    ],
)
def test_256_rows_are_what_they_are_alone(
    many: Mixed, alone: Pictures, sets: list[str], name: str, batch: int, options: list[str], shuffled: bool
) -> None:
    given = [f"run.batch_size={batch}", *sets, *(["ray.workers=2"] if name == "killed" else [])]
    name = f"{name}{len(sets)}"
    began = time.monotonic()
    if name.startswith("killed"):
        kill_twice(many, name, given, options, shuffled)
    found = many.run(name, given, *options, shuffled=shuffled)
    # Bytes depend on the size of a call: for each there is a row alone of its own, an eighth of them for time's sake.
    equal = bool(sets)
    same = alone if batch == 4 or not sets else many.alone(f"{name}alone", given, every=8)
    check(found, same, {row.key for row in many.rows}, equal, f"{name}, {time.monotonic() - began:.0f} s")


def kill_twice(many: Mixed, name: str, sets: Sequence[str], options: Sequence[str], shuffled: bool) -> None:
    """Begins the run; after its first shard a worker is killed, and after the next the driver."""
    markers = Path(many.job(name, sets, shuffled).output.uri) / "__batchsd" / "ledger"
    process = started(many.folder, name, sets, *options)

    def wait_for(count: int) -> None:
        began = time.monotonic()
        while len(list(markers.rglob("*.json"))) < count:
            assert process.poll() is None and time.monotonic() - began < 1800, "ended before it was killed"
            time.sleep(0.2)

    wait_for(1)
    worker = workers_of(process.pid)[0]
    os.kill(worker, signal.SIGKILL)
    wait_for(3)
    assert worker not in workers_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(markers.rglob("*.json")))
    print(f"{name}: a worker killed after 1 shard, the driver after {done} of 8", flush=True)
    assert done < 8


def workers_of(driver: int) -> list[int]:
    """Process ids of the Ray actors below a driver."""
    parents, titles = {}, {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(process.name)] = (process / "cmdline").read_text()
            except OSError:
                continue  # it has just ended

    def below(process: int) -> bool:
        return process in parents and (parents[process] == driver or below(parents[process]))

    return [process for process, title in titles.items() if title.startswith("ray::Worker") and below(process)]
