"""What `batchsd init` writes runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchsd.cli import commands
from batchsd.job import load
from batchsd.starter import PROMPTS, start
from batchsd.types import UsageError


def test_a_begun_job_draws_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    said = runner.invoke(commands, ["init", "first"], catch_exceptions=False).output
    assert said.endswith("batchsd run first/job.toml\n")
    runner.invoke(commands, ["run", "first/job.toml", "--local", "--set", "sampler.steps=2"], catch_exceptions=False)
    table = pq.read_table("first/out/data")
    assert table.column("prompt").to_pylist() == list(PROMPTS)
    assert table.column("status").to_pylist() == ["ok"] * len(PROMPTS)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / "job.toml").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        start(tmp_path)
    assert (tmp_path / "job.toml").read_text() == "mine"


def test_every_line_that_is_commented_out_is_a_setting(tmp_path: Path) -> None:
    """With all of them taken in the file still loads."""
    job, _ = start(tmp_path)
    prose = ("# batchsd run", "# Every key")
    lines = [line if line.startswith(prose) else line.removeprefix("# ") for line in job.read_text().splitlines()]
    job.write_text("\n".join(lines))
    loaded = load(job, (), {})
    assert loaded.input.repeat == 4 and loaded.output.sink == "webdataset"
