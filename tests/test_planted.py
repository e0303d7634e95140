"""Rows that go wrong in each way, in a real job: one error row each, and neighbours the same to the byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from batchsd.cli import main

HERE = Path(__file__).parent
ROWS = 16
PLANTS = {1: "raises", 4: "oom", 6: "nan", 9: "flat"}
STATUS = {"raises": "error", "kills": "crashed", "hangs": "timeout"}


def job_with(folder: Path, checkpoint: Path, plants: dict[int, str]) -> list[str]:
    """The arguments of `batchsd run` for a job with those rows planted."""
    folder.mkdir()
    prompts = [f"a {'red' if i % 2 else 'blue'} cube" for i in range(ROWS)]
    rows = {"id": [f"row{i}" for i in range(ROWS)], "prompt": prompts, "plant": [plants.get(i) for i in range(ROWS)]}
    pq.write_table(pa.table(rows, pa.schema([(name, pa.string()) for name in rows])), folder / "prompts.parquet")
    shutil.copy(HERE / "planted.py", folder)
    (folder / "job.toml").write_text(
        f'plugins = ["./planted.py"]\n[input]\nmanifest = "prompts.parquet"\n[model]\npath = "{checkpoint}"\n'
        'device = "cpu"\n[sampler]\nsteps = 2\nheight = 16\nwidth = 16\n[conditioning]\ntask = "planted"\n'
        '[output]\nuri = "out"\nrows_per_shard = 8\n'
        "[run]\nmax_failed = 1.0\ndeterministic = true\nbatch_size = 4\ntimeout = 20\n"
    )
    return ["run", str(folder / "job.toml")]


def start(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "batchsd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def output(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "out/data").glob("*.parquet"))
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def check(folder: Path, healthy: Path, plants: dict[int, str]) -> None:
    """Every row there, exactly the planted ones failed, every other one equal to the byte."""
    found, whole = output(folder), output(healthy)
    assert [row["status"] for row in whole] == ["ok"] * ROWS
    statuses = {i: row["status"] for i, row in enumerate(found) if row["status"] != "ok"}
    assert statuses == {i: STATUS.get(kind, kind) for i, kind in plants.items()}
    for i, (row, other) in enumerate(zip(found, whole, strict=True)):
        if i in plants:
            assert row["image"] is None and row["error"]
        else:
            assert row == other


@pytest.fixture
def as_torch_was() -> Iterator[None]:
    """`run.deterministic` is for a whole process."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_each_way_of_failing_costs_one_row(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, as_torch_was: None
) -> None:
    for folder, plants in ((tmp_path / "healthy", {}), (tmp_path / "planted", PLANTS)):
        monkeypatch.setattr(sys, "argv", ["batchsd", *job_with(folder, checkpoint, plants), "--local"])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
    check(tmp_path / "planted", tmp_path / "healthy", PLANTS)


@pytest.mark.soak
@pytest.mark.parametrize("place", [["--local"], ["--address", "local", "--set", "ray.workers=2"]], ids=["here", "Ray"])
def test_rows_that_kill_and_hang_with_the_real_engine(tmp_path: Path, checkpoint: Path, place: list[str]) -> None:
    plants = {5: "kills", 12: "hangs"}
    assert start([*job_with(tmp_path / "healthy", checkpoint, {}), "--local"]).returncode == 0
    run = [*job_with(tmp_path / "planted", checkpoint, plants), *place]
    codes = []
    while not codes or codes[-1]:
        codes.append((done := start(run)).returncode)
        assert len(codes) < 12 and "Traceback" not in done.stderr, done.stderr
    print(codes)
    assert codes == [0] if "local" in place else set(codes[:-1]) == {-9, 3}
    check(tmp_path / "planted", tmp_path / "healthy", plants)
    assert json.loads((tmp_path / "planted/out/__batchsd/SUCCESS.json").read_text())["failed"] == {
        "crashed": 1, "timeout": 1
    }  # fmt: skip
