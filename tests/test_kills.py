"""The kill matrix: a commit and a revision cut off at every step, in every layout, on disk and on S3; then run again.

The outcome is always the undisturbed run's, to the byte: every row once, no orphan, no marker changed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
from fakes import lanes
from kills import disk_steps, request_steps
from null_model import job_at, picture_of, write_manifest
from s3 import MemoryS3

import batchsd
from batchsd import object_store, plugins, store
from batchsd.bench import Workbench
from batchsd.drive import drive
from batchsd.executor import InProcess
from batchsd.job import Job
from batchsd.ledger import Ledger
from batchsd.prepare import Prepared, prepare
from batchsd.revise import Beginning, begin_run, begin_update, replace_uri
from batchsd.stop import Stop
from batchsd.store import TEMPORARY, open_store
from batchsd.types import Record, Request
from batchsd.verify import verify

MODEL = Path(batchsd.__file__).parent / "assets/tiny-scenes"
LAYOUTS = {
    "parquet": (),
    "parquet aside": ("output.failed=aside",),
    "webdataset": ("output.sink=webdataset",),
    "folder": ("output.sink=folder",),
}
ROWS = 3  # in a shard
Files = dict[str, bytes]


def prompts(shards: int, edited: bool) -> list[str | None]:
    """Of each shard the first row failed, was edited and is good; the second is good and fails; the last stands."""
    before, after = ("fails", "good", "stays"), ("mended", "fails now", "stays")
    return [f"{word} {shard}" for shard in range(shards) for word in (after if edited else before)]


def draw(request: Request) -> Record:
    if "fails" in request.prompt:
        return Record(request, "oom", "no room")
    return Record(request, "ok", image=picture_of(request), height=16, width=16)


Begin = Callable[[Sequence[Prepared]], list[Beginning]]


def run(parts: Sequence[Prepared], begin: Begin) -> None:
    """What `batchsd run` does, from the plan on."""
    for begun in begin([replace(part, ledger=Ledger(part.ledger.store, part.plan.number)) for part in parts]):
        part, recipe = begun.prepared, begun.prepared.recipe
        if begun.complete:
            part.ledger.finish(part.plan)
            continue
        reader, generate = recipe.reader(), partial(lanes, record=draw)
        bench = Workbench(generate, reader.read, 1, recipe.sink(), recipe.schema, part.ledger.store)
        executor, silent = InProcess(partial(lambda bench: bench, bench)), lambda *_: None
        limits = (Stop(5), part.max_failed, silent, silent)
        drive(part.ledger, part.plan, begun.tally, part.shards, executor, *limits, revisions=begun.revisions)


class Disk:
    """A run folder of which every file can be looked at, and put back."""

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root)
        self.steps = disk_steps()

    def files(self) -> Files:
        return {p.relative_to(self.root).as_posix(): p.read_bytes() for p in self.root.rglob("*") if p.is_file()}

    def restore(self, files: Files) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        for name, data in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(data)


class Memory:
    """The same on an S3 in this process."""

    def __init__(self, memory: MemoryS3) -> None:
        self.objects, self.uri = memory.objects, "s3://bucket/run"
        self.steps = request_steps()

    def files(self) -> Files:
        return {key.removeprefix("run/"): data for key, data in self.objects.items()}

    def restore(self, files: Files) -> None:
        self.objects.clear()
        self.objects.update({f"run/{name}": data for name, data in files.items()})


class Bucket:
    """The same on a server."""

    def __init__(self, bucket: str) -> None:
        self.bucket, self.uri = bucket, f"s3://{bucket}/run"
        self.steps = request_steps()
        self._seen: dict[str, bytes] = {}  # by ETag: what is unchanged is not fetched again

    def files(self) -> Files:
        client, found = object_store.client(), {}
        for entry in client.list_objects_v2(Bucket=self.bucket).get("Contents", ()):
            if entry["ETag"] not in self._seen:
                body = client.get_object(Bucket=self.bucket, Key=entry["Key"])["Body"]
                self._seen[entry["ETag"]] = body.read()
            found[entry["Key"].removeprefix("run/")] = self._seen[entry["ETag"]]
        return found

    def restore(self, files: Files) -> None:
        client, there = object_store.client(), self.files()
        for name in there.keys() - files.keys():
            client.delete_object(Bucket=self.bucket, Key=f"run/{name}")
        for name, data in files.items():
            if there.get(name) != data:
                client.put_object(Bucket=self.bucket, Key=f"run/{name}", Body=data)


Place = Disk | Memory | Bucket


def matrix(local: Sequence[str], server: Sequence[str]) -> pytest.MarkDecorator:
    """All places and layouts; those not named are soaked only."""
    quick = {"disk": local, "memory": local, "moto": server}
    cells = [
        pytest.param(place, layout, marks=() if layout in named else pytest.mark.soak)
        for place, named in quick.items()
        for layout in LAYOUTS
    ]
    return pytest.mark.parametrize(("place", "layout"), cells, indirect=["place"])


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "disk":
        return Disk(tmp_path / "run")
    if request.param == "memory":
        return Memory(request.getfixturevalue("memory"))
    return Bucket(request.getfixturevalue("bucket"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process cannot show, and what every run would build anew."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(plugins, "build", lru_cache(plugins.build))
    monkeypatch.setattr(store, "LONGEST_WRITE", -1.0)


@pytest.fixture
def job(layout: str, tmp_path: Path, place: Place) -> Job:
    sets = (*LAYOUTS[layout], f"output.rows_per_shard={ROWS}", f"run.scratch={tmp_path}/scratch")
    made = job_at(tmp_path, MODEL, *sets)
    return replace_uri(made, place.uri)


def planned(job: Job, shards: int, edited: bool) -> list[Prepared]:
    write_manifest(Path(job.input.manifest), prompts(shards, edited))
    scratch = job.run.scratch if "://" in job.output.uri else ""
    kept = open_store(job.output.uri, scratch)
    return [replace(part, ledger=Ledger(kept, part.plan.number)) for part in prepare(job, 1, False)]


def published(files: Files) -> Files:
    return {name: data for name, data in files.items() if not name.startswith("__batchsd/")}


def markers(files: Files) -> Files:
    return {name: data for name, data in files.items() if re.fullmatch(r"__batchsd/ledger/\d+/\d.*json", name)}


def kill_at_every_step(place: Place, parts: Sequence[Prepared], before: Files, begin: Begin) -> int:
    """Give the number of steps at which the run was cut off."""
    once = partial(run, parts, begin)
    place.restore(before)
    once()
    whole = place.files()
    faults: list[str] = []
    verify(place.uri, faults.append, lambda verdict: None)
    assert faults == [] and len(published(whole)) > len(published(before)) // 2
    step = 0
    place.restore(before)
    while place.steps.killed_at(step, once):
        cut = markers(place.files())
        once()
        ended = place.files()
        assert published(ended) == published(whole), f"step {step}"
        assert markers(ended).keys() == markers(whole).keys(), f"step {step}"
        assert {name: markers(ended)[name] for name in cut} == cut, f"step {step}: a marker was changed"
        orphans = [name for name in ended if "/staging/" in name or TEMPORARY.fullmatch(Path(name).name)]
        assert orphans == [], f"step {step}"
        assert ended["__batchsd/SUCCESS.json"] == whole["__batchsd/SUCCESS.json"], f"step {step}"
        place.restore(before)
        step += 1
    return step


@pytest.fixture(params=["", pytest.param("wide", marks=pytest.mark.soak)])
def shards(request: pytest.FixtureRequest) -> int:
    """One shard has every kind of step."""
    return 3 if request.param else 1


@matrix(local=list(LAYOUTS), server=["parquet"])
def test_a_commit(place: Place, job: Job, shards: int) -> None:
    steps = kill_at_every_step(place, planned(job, shards, False), {}, begin_run)
    # the plan; for each shard its file in staging, its marker, its publish, its end; SUCCESS
    assert steps >= 2 + 4 * shards, "fewer steps than the protocol has"


@matrix(local=list(LAYOUTS), server=["parquet aside"])
def test_a_revision(place: Place, job: Job, shards: int) -> None:
    run(planned(job, shards, False), begin_run)
    before = place.files()
    steps = kill_at_every_step(place, planned(job, shards, True), before, begin_update)
    assert steps >= 2 + 4 * shards, "fewer steps than the protocol has"


@matrix(local=["parquet aside"], server=[])
def test_an_append(place: Place, job: Job, shards: int) -> None:
    run(planned(job, shards, False), begin_run)
    before = place.files()
    steps = kill_at_every_step(place, planned(job, 2 * shards, False), before, begin_update)
    assert steps >= 2 + 4 * shards, "fewer steps than the protocol has"
    assert published(before).items() <= published(place.files()).items(), "what was there is touched"
