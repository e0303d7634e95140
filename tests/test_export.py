"""Every layout from every layout: rows, pictures, failed and rejected ones, equal to those of the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from null_model import job_at, picture_of, rows_of, run_job, write_manifest

from batchsd.cli import commands
from batchsd.job import Job
from batchsd.types import Record, Request

SINKS = ("parquet", "webdataset", "folder")
ROWS = 9
APART = ("image", "file_name")  # the latter in folders only
PLUGIN = """
from batchsd import Filter, Score, hookimpl

@hookimpl
def register_scores():
    return {"red": Score.of(lambda requests, pictures: [])}

@hookimpl
def register_filters():
    return {"calm": Filter.of(lambda requests, pictures: [])}
"""


def fate(keep: bool, request: Request) -> Record:
    """Row 2 fails, row 4 is refused, rows 3 and 6 are rejected; a score everywhere else."""
    number = int(request.key[2:])
    if request.error:
        return Record(request, request.error.status, str(request.error))
    if number == 2:
        return Record(request, "oom", "no room")
    told: dict[str, Any] = {"height": 16, "width": 16, "scores": {"red": number / 8}, "figures": {"mean": number / 9}}
    if number in (3, 6):
        return Record(request, "rejected", "calm: it is not", picture_of(request) if keep else None, **told)
    return Record(request, "ok", None, picture_of(request), **told)


def run_of(folder: Path, checkpoint: Path, sink: str, rejected: str) -> Job:
    prompts = [f"row {i}" if i != 4 else None for i in range(ROWS)]
    columns = {"tags": [["a", None], None, ["b"]] * 3, "size": [0.5, None, 2.0] * 3}
    write_manifest(folder / "prompts.parquet", prompts, **columns)
    (folder / "mine.py").write_text(PLUGIN)
    job = job_at(
        folder, checkpoint, f"plugins=['{folder}/mine.py']", "output.scores=['red']", "output.filters=['calm']",
        f"output.rejected='{rejected}'", f"output.sink='{sink}'",
    )  # fmt: skip
    run_job(job, folder / "log", record=lambda request: fate(rejected == "keep", request))
    return job


def read(job: Job) -> dict[str, dict[str, Any]]:
    """Rows by the number in their id."""
    return {str(row["id"])[2:]: {**row, "image": row["image"] or None} for row in rows_of(job)}


@pytest.mark.parametrize("rejected", ["keep", "drop"])
@pytest.mark.parametrize("sink", SINKS)
def test_every_layout_from_every_layout(tmp_path: Path, checkpoint: Path, sink: str, rejected: str) -> None:
    job = run_of(tmp_path, checkpoint, sink, rejected)
    wanted = read(job)
    assert {key: row["status"] for key, row in wanted.items() if row["status"] != "ok"} == {
        "2": "oom", "3": "rejected", "4": "bad_input", "6": "rejected",
    }  # fmt: skip
    pictures = {key for key, row in wanted.items() if row["image"]}
    assert pictures == set("0157836" if rejected == "keep" else "01578") and len(wanted) == ROWS
    for target in SINKS:
        out = tmp_path / f"as-{target}"
        arguments = ["export", job.output.uri, "--sink", target, "--to", str(out)]
        result = CliRunner().invoke(commands, arguments, catch_exceptions=False)
        assert result.exit_code == 0 and result.output.startswith("9 rows -> "), result.output
        moved = job.model_copy(update={"output": job.output.model_copy(update={"uri": str(out), "sink": target})})
        assert as_json(read(moved)) == as_json(wanted)
        card = (out / "README.md").read_text()
        assert f"{len(pictures) - 2 * (rejected == 'keep')} pictures; 2 rows failed; 2 were rejected" in card
        assert ("Rejected rows have their pictures" in card) == (rejected == "keep")
        assert ("Failed and rejected rows" in card) == (rejected == "drop")


def as_json(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Pictures apart, as JSON holds them: the tar's own form."""
    text = {key: {name: value for name, value in row.items() if name not in APART} for key, row in rows.items()}
    return {"rows": json.loads(json.dumps(text)), "pictures": {key: row["image"] for key, row in rows.items()}}


def test_nanoseconds_survive(tmp_path: Path, checkpoint: Path) -> None:
    """Parquet to Parquet: the manifest's columns come back as Arrow has them."""
    write_manifest(tmp_path / "prompts.parquet", ["a", "b"], at=pa.array([1, None], pa.timestamp("ns", "UTC")))
    job = job_at(tmp_path, checkpoint, "output.embed=[]")
    run_job(job, tmp_path / "log", record=lambda request: replace(fate(False, request), scores={}))
    out = tmp_path / "again"
    arguments = ["export", job.output.uri, "--sink", "parquet", "--to", str(out)]
    CliRunner().invoke(commands, arguments, catch_exceptions=False)
    tables = [pq.read_table(Path(folder) / "data") for folder in (job.output.uri, out)]
    assert tables[0].equals(tables[1]) and tables[1]["at"].type == pa.timestamp("ns", "UTC")
