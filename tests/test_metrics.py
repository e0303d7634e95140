"""What Prometheus would be told of a run. The oracle: the run's own markers and rows."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from fakes import lanes, picture, published, run_all, shards_of, workbench

from batchsd import metrics
from batchsd.executor import InProcess, Kind
from batchsd.ledger import Ledger
from batchsd.metrics import METRICS, Measured, count_shard, record_for
from batchsd.store import LocalStore
from batchsd.types import STATUSES, OutputFile, Record, Request, Shard, ShardResult

ROOT = Path(__file__).parent.parent


class Told:
    """Adds counters up, keeps the last of each gauge."""

    def __init__(self) -> None:
        self.sums: Counter[tuple[str, str]] = Counter()
        self.last: dict[str, float] = {}

    def __call__(self, name: str, value: float = 1, label: str = "") -> None:
        assert bool(label) == bool(METRICS[name].label), name
        if METRICS[name].kind == "gauge":
            self.last[name] = value
        else:
            self.sums[name, label] += value


class Crew(InProcess):
    """Two places, one worker: this process."""

    manned = (1, 2)


def some_fail(request: Request) -> Record:
    return Record(request, *(("nan", "x") if request.index == 1 else ("ok",)), image=picture(request))


def test_the_sums_are_the_run_s(tmp_path: Path) -> None:
    told, store, shards = Told(), LocalStore(tmp_path), shards_of(3, 4)
    crashes = iter([True])

    def first_crashes(sources):
        for shard, record in lanes(sources, record=some_fail):
            yield shard, record
            if next(crashes, False):
                raise RuntimeError("once")

    executor = Measured(Crew(partial(workbench, store, first_crashes)), told)
    run_all(store, shards, executor=executor, max_failed=9)
    tally = Ledger(store).tally()
    assert told.sums["batchsd_rows_total", "ok"] == tally.ok == 9
    assert told.sums["batchsd_rows_total", "nan"] == tally.failed["nan"] == 3
    assert told.sums["batchsd_shards_total", ""] == 3
    assert told.sums["batchsd_bytes_total", ""] == sum(f.stat().st_size for f in (tmp_path / "data").iterdir())
    assert told.sums["batchsd_lost_total", "raised"] == 1
    assert told.sums["batchsd_attempts_total", ""] > 3
    assert told.sums["batchsd_drawn_total", ""] >= len(published(tmp_path)) == 12
    assert told.last == {
        "batchsd_running": 0,
        "batchsd_rows_planned": 12,
        "batchsd_rows_done": 12,
        "batchsd_workers": 1,
        "batchsd_workers_wanted": 2,
    }


def test_a_marker_s_timings_become_stages_and_an_occupancy() -> None:
    told = Told()
    timings = {"started": 1e9, "seconds": 40.0, "network_seconds": 30.0, "decode_seconds": 5.0}
    timings |= {"network_calls": 10, "evaluations": 120, "occupancy": 0.75}
    files = (OutputFile("a", 5, ""), OutputFile("b", 6, ""))
    count_shard(ShardResult(Shard(1, 0, 1, 0, 0, 4), "n", 4, 4, {}, files, {}, timings), told)
    assert told.sums["batchsd_stage_seconds_total", "network"] == 30
    assert told.sums["batchsd_stage_seconds_total", "decode"] == 5
    assert told.sums["batchsd_evaluations_total", ""] / told.sums["batchsd_lanes_total", ""] == 0.75
    assert told.sums["batchsd_shard_seconds", ""] == 40 and told.sums["batchsd_bytes_total", ""] == 11


def test_a_run_that_fails_is_not_at_work_any_more(tmp_path: Path) -> None:
    told = Told()

    def broken(sources):
        raise RuntimeError("always")
        yield

    executor = Measured(Crew(partial(workbench, LocalStore(tmp_path), broken)), told)
    with pytest.raises(Exception, match="no worker can start"):
        run_all(LocalStore(tmp_path), shards_of(1, 4), executor=executor)
    assert told.last["batchsd_running"] == 0 and told.sums["batchsd_lost_total", "raised"] == 3


def test_ray_s_instruments_take_every_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own classes, with what they record caught: names, kinds and labels are as it wants them."""
    found = []
    from ray.util.metrics import Metric

    monkeypatch.setattr(
        Metric, "_record", lambda self, value, tags=None: found.append((self.info["name"], value, tags))
    )
    metrics.instruments.cache_clear()
    record = record_for("s3://bucket/pictures/2026-11-23/")
    for name, metric in METRICS.items():
        record(name, 2.0, "x" if metric.label else "")
    record("batchsd_bytes_total", 0)
    tags = [({"run": "2026-11-23"} | ({metric.label: "x"} if metric.label else {})) for metric in METRICS.values()]
    assert found == [(name, 2.0, tag) for name, tag in zip(METRICS, tags, strict=True)]


def test_labels_have_few_values() -> None:
    """A status, a kind of loss, a stage: closed lists. Nothing of a row."""
    assert {metric.label for metric in METRICS.values()} == {"", "status", "kind", "stage"}
    stages = set(re.findall(r'stage\("(\w+)"\)', "".join(p.read_text() for p in (ROOT / "batchsd").glob("*.py"))))
    assert 3 <= len(stages) <= 12 and len(STATUSES) <= 12 and len(Kind.__args__) <= 12  # type: ignore[attr-defined]


def test_the_readme_lists_them_all() -> None:
    rows = re.findall(
        r"^\| `(batchsd_\w+)` \| (\w+) \| (?:`(\w+)`)? ?\| (.+) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert rows == [(name, metric.kind, metric.label, metric.text) for name, metric in METRICS.items()]
