"""What a job will take. The oracle: the same sums by hand, and the engine's own count of evaluations."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchsd.estimate import Rate, amount, estimate_lines, measure, sample
from batchsd.job import load
from batchsd.prepare import Prepared, prepare


@pytest.fixture
def prepared(tmp_path: Path, checkpoint: Path) -> Prepared:
    """8 rows: half Heun with guidance (two calls, two branches), half Euler without; one that cannot be drawn."""
    table = {
        "prompt": ["a red cube"] * 7 + [None],
        "scheduler": ["heun", "euler"] * 4,
        "guidance_scale": [5.0, 1.0] * 4,
        "steps": [3, 10] * 4,
    }
    pq.write_table(pa.table(table), tmp_path / "prompts.parquet", row_group_size=5)
    (tmp_path / "job.toml").write_text(
        f'[input]\nmanifest = "prompts.parquet"\nrepeat = 5\n[model]\npath = "{checkpoint}"\ndevice = "cpu"\n'
        '[sampler]\nheight = 16\nwidth = 16\n[output]\nuri = "out"\nrows_per_shard = 10\n'
    )
    (prepared,) = prepare(load(tmp_path / "job.toml", (), {}), 1, False)
    return prepared


def test_evaluations_time_and_bytes_are_sums(prepared: Prepared) -> None:
    rows = sample(prepared)
    assert len(rows) == 35  # 7 rows, 5 times each
    lines = estimate_lines(prepared, 4, 0.5, Rate(2.0, "--rate"), rows)
    each = (4 * 3 * 2 * 2 + 3 * 10) / 7
    work = re.fullmatch(r"work    about ([\d,]+) network evaluations, (\d+) a picture", lines[0])
    assert work and int(work[1]) == round(40 * each) and int(work[2]) == round(each)
    assert lines[1] == "groups  the manifest's row groups: 2, of at most 5 rows"
    assert lines[-1].startswith("time    about 5 s, 0.0 GPU-hours: 2 pictures/s a worker (--rate), 4 workers")
    assert not any(line.startswith("time") for line in estimate_lines(prepared, 4, 0, None, rows))


def test_a_measured_rate_draws_rows_and_writes_nothing(prepared: Prepared, tmp_path: Path) -> None:
    rows = sample(prepared)
    rate = measure(rows, prepared.recipe)
    assert rate.source == f"measured on {len(rows)} rows here"
    assert rate.pictures > 0 and 100 < rate.bytes < 2000  # 16 x 16 PNGs
    assert not (tmp_path / "out").exists()


def test_nothing_drawable_is_said(prepared: Prepared) -> None:
    (line,) = estimate_lines(prepared, 1, 0, None, [])
    assert "batchsd validate" in line


@pytest.mark.parametrize("count, text", [(999, "999 B"), (1234, "1.23 kB"), (5.6e7, "56 MB"), (7e12, "7 TB")])
def test_amounts(count: float, text: str) -> None:
    assert amount(count) == text
